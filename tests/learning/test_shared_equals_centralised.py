"""Several clients in `shared` mode, merged after every step, are one model on the concatenated batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import Finished, write_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from unsplit import backward

from client_edge.text.batches import Batch, TrainBatches
from client_edge.text.reading import read_examples
from splitfl.config.own import DataSection

STEPS = 5
LEARNING_RATE = 0.5
CLIENTS = ("ash", "birch", "cedar")


def settings(directory: Path, weight_by: str) -> dict[str, Any]:
    return {
        "seed": 11,
        "model": {"model_name_or_path": str(directory)},
        "train": {"bottom": "full", "top": "full", "backbone": "full", "norm_head": True, "embeddings": True},
        "optimizer": {
            "optim": "sgd",
            "learning_rate": LEARNING_RATE,
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
        },
        "federation": {
            "num_rounds": STEPS,
            "local_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "min_available_clients": len(CLIENTS),
            "weight_by": weight_by,
        },
        "strategy": {"max_client_weight": 1.0},  # one of the three has more than half of the tokens
        "server": {"export_model": False},
    }


def micro_batches(directory: Path, data: Path, client_id: str) -> TrainBatches:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    dataset = read_examples(data, section=DataSection(), tokenizer=tokenizer, max_seq_length=512, append_eos=True)
    return TrainBatches(
        dataset, seed=11, client_id=client_id, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )


def centralised(directory: Path, clients: list[TrainBatches]) -> dict[str, torch.Tensor]:
    """Plain SGD of the whole model on all clients' batches at once."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(1, STEPS + 1):
        batches: list[Batch] = [batch for client in clients for batch in client.at(step)]
        backward(model, batches)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def largest_difference(split: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> float:
    assert split.keys() == whole.keys()
    return max(float((split[name] - whole[name]).abs().max()) for name in whole)


def train(
    make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path, weight_by: str
) -> tuple[float, float]:
    """Return how far split is from centralised, and how far both went."""
    directory = make_model("llama", tie_word_embeddings=True)
    # unlike lengths, so that weights by examples and by label tokens are not the same
    data = {
        name: write_text(tmp_path / f"{name}.txt", num_lines=9, seed=number, lengths=(4 + 9 * number, 8 + 9 * number))
        for number, name in enumerate(CLIENTS)
    }
    clients = {name: {"path": path, "eval_fraction": 0.0} for name, path in data.items()}
    finished = federate(settings(directory, weight_by), clients, transport="tcp")
    assert finished.errors == {}
    whole = centralised(directory, [micro_batches(directory, data[name], name) for name in CLIENTS])
    first = dict(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).named_parameters())
    split = load_file(finished.run_dir / "trained.safetensors")
    return largest_difference(split, whole), largest_difference(whole, {n: p.detach() for n, p in first.items()})


def test_weights_by_label_tokens_give_the_centralised_model(
    make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> None:
    difference, moved = train(make_model, federate, tmp_path, "num_tokens")
    assert difference <= 1e-6
    assert moved > 1e-2


def test_weights_by_examples_do_not(
    make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> None:
    difference, _ = train(make_model, federate, tmp_path, "uniform")
    assert difference > 1e-5
