"""What clients report of held-out text is what the unsplit model gives on it, computed an example at a time."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from client_edge.measuring.scores import accuracy, exact_match, macro_f1, rouge_l
from splitfl.telemetry.metrics import Event, read_events

WORDS = (" yes", " no", " may be")
ALL = ["exact_match", "rouge_l", "accuracy", "macro_f1"]
NEW_TOKENS = 8


def write_questions(path: Path, *, num: int, seed: int, words: Sequence[str] = WORDS) -> Path:
    draw = random.Random(seed)
    lines = [
        json.dumps({"prompt": "".join(draw.choices("abcdef", k=draw.randint(2, 9))), "completion": draw.choice(words)})
        for _ in range(num)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Unsplit:
    """The whole model, and what it makes of a file of prompts and completions."""

    def __init__(self, directory: Path) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def scored(self, prompt: list[int], completion: list[int]) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each token of a completion, and whether it is the likeliest."""
        with torch.no_grad():
            logits_SV = self.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.tensor(completion)
        log_S = logits_SV.log_softmax(dim=-1).gather(1, wanted.unsqueeze(1)).squeeze(1)
        return log_S, logits_SV.argmax(dim=-1) == wanted

    def answer(self, prompt: list[int]) -> str:
        said = self.model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=2, eos_token_id=2
        )
        return self.tokenizer.decode(said[0, len(prompt) :], skip_special_tokens=True)

    def measures(self, path: Path) -> dict[str, float]:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        pairs = [(self.ids(row["prompt"]), [*self.ids(row["completion"]), 2]) for row in rows]
        scores = [self.scored(*pair) for pair in pairs]
        loss = -float(torch.cat([log_S for log_S, _ in scores]).double().mean())
        # this tokenizer does not give a text back, so both sides are compared as it decodes them
        answers = [(self.answer(prompt), self.tokenizer.decode(completion[:-1])) for prompt, completion in pairs]
        labels = [[*self.ids(word), 2] for word in WORDS]
        chosen = [max(labels, key=lambda each: float(self.scored(prompt, each)[0].sum())) for prompt, _ in pairs]
        names = [WORDS[labels.index(each)] for each in chosen]
        own = [row["completion"] for row in rows]
        return {
            "eval_loss": loss,
            "perplexity": math.exp(loss),
            "token_accuracy": float(torch.cat([hits for _, hits in scores]).double().mean()),
            "exact_match": sum(exact_match(*each) for each in answers) / len(answers),
            "rouge_l": sum(rouge_l(*each) for each in answers) / len(answers),
            "accuracy": accuracy(own, names),
            "macro_f1": macro_f1(own, names),
        }


@pytest.fixture
def run(
    make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> Callable[..., tuple[Finished, Path]]:
    """Train two clients on questions; returns what is left and the model's directory."""

    def go(
        sections: dict[str, Any], *, family: str = "llama", data: Callable[[int], dict[str, Any]] | None = None
    ) -> tuple[Finished, Path]:
        directory = make_model(family)

        def usual(number: int) -> dict[str, Any]:
            return {
                "path": write_questions(tmp_path / f"{number}.jsonl", num=12, seed=number),
                "eval_path": write_questions(tmp_path / f"held-{number}.jsonl", num=5 + number, seed=10 + number),
            }

        tree: dict[str, Any] = {
            "model": {"model_name_or_path": str(directory)},
            "optimizer": {"learning_rate": 2e-2},
            "text": {"max_seq_length": 24},
            "federation": {
                "num_rounds": 2,
                "local_steps": 6,
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 3,
                "min_available_clients": 2,
            },
            "evaluation": {"measures": ALL, "max_new_tokens": NEW_TOKENS, "num_examples": 0},
        }
        names = {*tree, *sections}
        settings = {name: {**tree.get(name, {}), **sections.get(name, {})} for name in names}
        return federate(settings, {f"clinic-{n}": (data or usual)(n) for n in range(2)}), directory

    return go


def evaluated(finished: Finished, client_id: str, phase: str) -> Event:
    assert finished.errors == {}
    (event,) = [
        event
        for event in read_events(finished.run_dir / "metrics.jsonl")
        if event["event"] == "evaluated" and (event["client_id"], event["phase"]) == (client_id, phase)
    ]
    return event


@pytest.mark.parametrize(
    ("family", "loss", "words"), [("llama", "chunked", WORDS), ("gpt2", "plain", ()), ("gemma2", "chunked", WORDS)]
)
def test_each_measure_is_that_of_the_unsplit_model(
    run: Callable[..., tuple[Finished, Path]], tmp_path: Path, family: str, loss: str, words: tuple[str, ...]
) -> None:
    finished, before = run({"train": {"loss": loss}, "evaluation": {"label_words": words}}, family=family)
    for phase, directory in (("before", before), ("after", finished.run_dir / "model")):
        whole = Unsplit(directory)
        for number in range(2):
            event = evaluated(finished, f"clinic-{number}", phase)
            wanted = whole.measures(tmp_path / f"held-{number}.jsonl")
            found = {name: event[name] for name in wanted}
            assert found == pytest.approx(wanted, rel=2e-5), phase
            counts = {name: event[name] for name in ("num_eval_examples", "num_generated", "num_classified")}
            assert set(counts.values()) == {5 + number}
    assert finished.folders["clinic-0"].joinpath("metrics.jsonl").exists()


def test_measures_that_are_not_asked_for_are_not_there(run: Callable[..., tuple[Finished, Path]]) -> None:
    finished, _ = run({"evaluation": {"measures": ["accuracy"]}})
    event = evaluated(finished, "clinic-0", "after")
    assert {"perplexity", "token_accuracy", "accuracy", "num_eval_tokens"} <= set(event)
    assert {"macro_f1", "rouge_l", "exact_match", "num_generated"}.isdisjoint(event)


def test_prompts_are_bounded_and_spread_over_the_file(run: Callable[..., tuple[Finished, Path]]) -> None:
    finished, _ = run({"evaluation": {"measures": ["rouge_l"], "num_examples": 3, "max_new_tokens": 2}})
    assert evaluated(finished, "clinic-1", "before")["num_generated"] == 3
