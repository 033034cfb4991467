"""The model card of what a run has trained: how, from what, and nothing of anybody's text.

It is written from the run's settings and its report. Names of clients, files and folders stay out of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from splitfl.config.trees import RunConfig
from splitfl.models.origin import is_hub_id
from splitfl.telemetry.units import counted

CARD_FILE = "README.md"
Format = Literal["merged", "adapter"]

_LIBRARIES: Mapping[Format, str] = {"merged": "transformers", "adapter": "peft"}
_LOADED_BY: Mapping[Format, str] = {
    "merged": 'AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
    "adapter": 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "THIS_FOLDER")',
}
# Sections of the settings that say how the weights came about; the others are about machines and disks.
_TOLD = ("train", "lora", "optimizer", "text")


def card_of(run: RunConfig, report: Mapping[str, Any], format_: Format) -> str:
    """Write the card as Markdown with the hub's front matter; `report` is `telemetry.report.build_report`'s."""
    from huggingface_hub import ModelCardData

    name = run.model.model_name_or_path
    front = ModelCardData(
        base_model=name if is_hub_id(name) else None,  # a path on the server's machine is nobody else's affair
        library_name=_LIBRARIES[format_],
        license="unknown",
        pipeline_tag="text-generation",
        tags=["splitfl", "split-learning", "federated-learning"],
    )
    base = name if is_hub_id(name) else Path(name).name
    sections = [
        f"---\n{front.to_yaml()}\n---\n\n# {base}, trained with splitfl",
        f"Load it with `{_LOADED_BY[format_]}`; splitfl is not needed for that.",
        "Split federated training: the clients kept their text, the ends of the model and the labels; a server computed"
        " the blocks in between. The text is not described here.",
        _table(list(_facts(run, report, base))),
        "Settings (sections of the run's configuration):",
        _table([(f"{section}.{key}", value) for section in _TOLD for key, value in _settings_of(run, section)]),
    ]
    return "\n\n".join(sections) + "\n"


def _facts(run: RunConfig, report: Mapping[str, Any], base: str) -> Iterator[tuple[str, object]]:
    federation = run.federation
    yield "base model", base
    yield "cut", f"{counted(run.model.bottom_layers, 'block')} below and {run.model.top_layers} above on the clients"
    yield "run begun", report["date"]
    yield "rounds merged", f"{report['num_rounds']} of {federation.num_rounds}"
    if report["best_round"]:
        yield "weights of", f"round {report['best_round']}, the best by {federation.metric_for_best_model}"
    yield "optimizer steps in a round", federation.local_steps
    yield "commits", report["steps"]
    yield "clients", len(report["clients"])
    yield "server mode", federation.server_mode
    yield (
        "examples in a step of a client",
        (federation.per_device_train_batch_size * federation.gradient_accumulation_steps),
    )
    yield "mean held-out loss before", _loss(report["eval_loss_before"])
    yield "mean held-out loss after", _loss(report["eval_loss_after"])
    yield "seed", run.seed
    yield "versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items())


def _settings_of(run: RunConfig, section: str) -> Iterator[tuple[str, object]]:
    yield from getattr(run, section).model_dump(mode="json").items()


def _loss(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.4f} nats a token"


def _table(rows: Sequence[tuple[str, object]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
