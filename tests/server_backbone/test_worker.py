"""The worker's share of a step that several clients take together."""

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForCausalLM

from server_backbone.compute.blocks_worker import Contribution, MicroBatch
from server_backbone.compute.gradient_rules import Draft, rules_of_rounds
from server_backbone.compute.worker import Worker, worker_of
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.models.layout import Layout
from splitfl.models.trainable import choose_trainable


@pytest.mark.parametrize("claimed", [1e20, 3.0])
def test_whoever_claims_huge_norms_does_not_stop_the_others(claimed: float) -> None:
    """By default nobody's norm counts for more than 10 where steps are clipped to 1."""
    torch.manual_seed(0)
    run = RunConfig()
    cut = Cut.of(AutoModelForCausalLM.from_config(tiny_config("llama")), bottom_layers=1, top_layers=1)
    choose_trainable(cut, run)
    worker = worker_of(cut, run, rules_of_rounds(run, cut), torch.device("cpu"))
    num_tensors = len(cut.trainable("client"))
    norms = {"honest": [0.0] * num_tensors, "mallory": [claimed] + [-1.0] * (num_tensors - 1)}
    step = worker.reduce(
        [Contribution(client_id=name, step=1, num_label_tokens=5, norms_P=each) for name, each in norms.items()]
    )
    assert step.clip_coefficient == pytest.approx(1 / (min(claimed, 10.0) / 2), rel=1e-3)


CLIENTS = [f"clinic-{number:02d}" for number in range(16)]
TOKENS = [1 + 3 * number for number in range(16)]


def half_worker() -> tuple[Worker, int]:
    torch.manual_seed(0)
    run = RunConfig.model_validate(
        {
            "model": {"dtype": "bfloat16"},
            "train": {"backbone": "full"},
            "federation": {"client_max_grad_norm": 0.0},  # which would scale what several clients have
        }
    )
    whole = AutoModelForCausalLM.from_config(tiny_config("llama")).to(torch.bfloat16)
    cut = Cut.of(whole, bottom_layers=1, top_layers=1)
    choose_trainable(cut, run)
    return worker_of(cut, run, rules_of_rounds(run, cut), torch.device("cpu")), len(cut.trainable("client"))


def learn(worker: Worker, number: int) -> None:
    """Have one client's gradients made, the same whenever it is asked for."""
    draw = torch.Generator().manual_seed(number)
    hidden_BSD, gradient_BSD = (torch.randn(2, 5, 32, generator=draw).bfloat16() for _ in range(2))
    layout = Layout(lengths_B=(5, 5))
    for micro_batch in range(2):
        batch = MicroBatch(
            hidden_BSD=hidden_BSD, layout=layout, request_id=micro_batch, step=1, micro_batch=micro_batch
        )
        worker.forward(CLIENTS[number], batch)
        worker.backward(CLIENTS[number], micro_batch, gradient_BSD)


def reduced(worker: Worker, numbers: list[int], num_norms: int) -> dict[str, torch.Tensor]:
    """Return the sum of these clients' gradients, weighted by label tokens."""
    members = [
        Contribution(client_id=CLIENTS[number], step=1, num_label_tokens=TOKENS[number], norms_P=[-1.0] * num_norms)
        for number in numbers
    ]
    return dict(worker.reduce(members).gradients)


@pytest.mark.parametrize("num_clients", [2, 8, 16])
def test_bfloat16_gradients_of_several_clients_are_rounded_once(num_clients: int) -> None:
    """Each value of the sum is the nearest bfloat16 to the exact one, whatever the number of clients."""
    worker, num_norms = half_worker()
    numbers = list(range(num_clients))
    total = sum(TOKENS[:num_clients])
    exact: dict[str, torch.Tensor] = {}
    for number in numbers:
        learn(worker, number)
        for name, gradient in reduced(worker, [number], num_norms).items():
            weighted = gradient.double() * (TOKENS[number] / total)
            exact[name] = exact[name] + weighted if name in exact else weighted
    for number in numbers:
        learn(worker, number)
    for name, gradient in reduced(worker, numbers, num_norms).items():
        assert gradient.dtype == torch.bfloat16
        # half a unit in the last of 8 bits, and what float32 loses where large parts cancel
        slack = 2.0**-22 * exact[name].abs().max()
        assert ((gradient.double() - exact[name]).abs() <= 2.0**-8 * exact[name].abs() * 1.01 + slack).all(), name


def test_one_clients_bfloat16_gradients_are_torchs_own() -> None:
    """As the unsplit model has them: its micro-batches are added up by autograd."""
    worker, num_norms = half_worker()
    learn(worker, 3)
    gradients = [each.clone() for each in worker._under_way[CLIENTS[3]].gradients if each is not None]
    assert all(map(torch.equal, reduced(worker, [3], num_norms).values(), gradients))


def test_another_rule_is_one_more_class() -> None:
    """As noise on the sum would be: it sees the sum of all members, and what it makes of that is the step."""
    worker, num_norms = half_worker()
    seen: list[int] = []

    class Halve:
        def __call__(self, draft: Draft) -> None:
            seen.append(len(draft.members))
            draft.total = [None if each is None else each / 2 for each in draft.total]

    for number in (1, 2):
        learn(worker, number)
    plain = reduced(worker, [1, 2], num_norms)
    for number in (1, 2):
        learn(worker, number)
    worker._rules = [*worker._rules, Halve()]
    halved = reduced(worker, [1, 2], num_norms)
    assert all(torch.equal(halved[name] * 2, plain[name]) for name in plain)
    assert seen == [2]
