"""A tied and trained embedding with the chunked loss: the plain loss's gradients, however micro-batches overlap."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from conftest import tiny_config
from torch import Tensor

from client_edge.layers.edge import Edge
from client_edge.text.batches import Batch
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.models.source import empty_model
from splitfl.models.trainable import choose_trainable

NAME = "model.embed_tokens.weight"


def batch(seed: int) -> Batch:
    ids_BS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(seed))
    return Batch(input_ids_BS=ids_BS, labels_BS=ids_BS, lengths_B=(9, 9), num_label_tokens=16)


@pytest.fixture
def gradient() -> Callable[..., Tensor]:
    """Take the embedding's gradient of a step of three micro-batches."""

    def take(loss: Literal["plain", "chunked"], order: str) -> Tensor:
        train = {
            "bottom": "full",
            "top": "full",
            "backbone": "full",
            "embeddings": True,
            "norm_head": True,
            "loss": loss,
        }
        run = RunConfig.from_tree({"train": train}, source="test")
        cut = Cut.of(
            empty_model(tiny_config("llama", tie_word_embeddings=True), run.model), bottom_layers=1, top_layers=1
        )
        choose_trainable(cut, run)
        draw = torch.Generator().manual_seed(5)
        cut.fill("client", lambda _, values: values.normal_(std=0.3, generator=draw), torch.device("cpu"))
        edge = Edge(cut, run, "clinic", torch.device("cpu"))
        visits = [edge.bottom_forward(batch(number), step=1, number=number) for number in range(3)]
        tops = iter(visits)
        bottoms = iter(visits)
        gradients: list[Tensor] = []
        back = iter(range(3))
        for turn in order:
            if turn == "t":
                visit = next(tops)
                hidden_BSD = visit.hidden_BSD.detach()
                gradients.append(edge.top_loss_and_backward(visit, hidden_BSD, step=1, num_label_tokens=48)[1])
            else:
                edge.bottom_backward(next(bottoms), gradients[next(back)])
        edge.finish_gradients(1)
        return edge.gradients()[NAME]

    return take


def test_near_the_plain_losss(gradient: Callable[..., Tensor]) -> None:
    plain, chunked = gradient("plain", "tbtbtb"), gradient("chunked", "tbtbtb")
    assert not chunked.is_sparse
    assert float((chunked - plain).norm() / plain.norm()) < 1e-6


def test_the_same_bits_however_micro_batches_overlap(gradient: Callable[..., Tensor]) -> None:
    assert torch.equal(gradient("chunked", "tbtbtb"), gradient("chunked", "tttbbb"))
    assert torch.equal(gradient("chunked", "tbtbtb"), gradient("chunked", "ttbtbb"))
