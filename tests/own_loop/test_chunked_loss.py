"""A model from `connect` takes its loss without logits, by the run's `train.loss`, and gives them to a reader."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from own_loop.host import FULL, Host, adamw, batches, train, whole_model
from own_loop.test_trainers import trainer

import client_edge
from splitfl.errors import DataError
from splitfl.models.deferred import DeferredLogits

Start = Callable[..., Host]

CHUNKED = {**FULL, "loss": "chunked"}


def test_losses_of_a_loop_are_the_unsplit_models_to_rounding(host: Start) -> None:
    server = host(train=CHUNKED)
    split, whole = server.connect(), whole_model(server.directory, is_lora=False)
    given = batches(6, side="left")
    losses = train(split, adamw(split), given, every=2, clip=0.5)
    assert losses == pytest.approx(train(whole, adamw(whole), given, every=2, clip=0.5), rel=1e-5)


def test_the_trainer_never_makes_logits(host: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = host(train=CHUNKED)
    split, made = server.connect(), []
    computed = DeferredLogits.computed
    monkeypatch.setattr(DeferredLogits, "computed", lambda logits: made.append(1) or computed(logits))
    found = []
    for model in (split, whole_model(server.directory, is_lora=False)):
        run, log = trainer(model, tmp_path / str(len(found)))
        run.train()
        found.append([value for line in log.lines for name, value in line.items() if name.endswith("loss")])
    assert len(found[0]) == len(found[1]) > 8
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert made == []


def test_who_asks_gets_the_logits(host: Start) -> None:
    server = host(train=CHUNKED)
    split, whole = server.connect(), whole_model(server.directory, is_lora=False).eval()
    with torch.no_grad():
        assert torch.equal(split(**batches(1)[0]).logits.clone(), whole(**batches(1)[0]).logits)


class TestBatchesThatCannotBe:
    @pytest.mark.parametrize("loss", ["plain", "chunked"])
    def test_no_label_at_all(self, loss: str, host: Start) -> None:
        server = host(train={"loss": loss})
        model = server.connect().train()
        (batch,) = batches(1)
        nothing = torch.full_like(batch["labels"], -100)
        with pytest.raises(DataError, match="every label of this batch is -100"):
            model(**{**batch, "labels": nothing})
        nothing[:, 0] = 5
        with pytest.raises(DataError, match="every label of this batch is -100"):
            model(**{**batch, "labels": nothing})
        # a share of a larger batch may have none: it then adds nothing
        model(**{**batch, "labels": nothing}, num_items_in_batch=torch.tensor(7)).loss.backward()
        model(**batch, num_items_in_batch=torch.tensor(7)).loss.backward()
        adamw(model).step()
        server.wait_for("step")

    def test_ids_without_a_row_in_the_embedding(self, host: Start) -> None:
        server = host()
        model = server.connect()
        size = model.config.vocab_size
        for wrong in (size, -1):
            with torch.no_grad(), pytest.raises(DataError, match=rf"the model knows those from 0 to {size - 1}"):
                model(input_ids=torch.tensor([[5, wrong]]))
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, size - 1]]))

    def test_rows_of_one_token(self, host: Start) -> None:
        server = host()
        model, whole = server.connect(), whole_model(server.directory, is_lora=True).eval()
        with torch.no_grad():
            alone = torch.tensor([[5]])
            # not bit for bit: a product with one row is rounded by where in memory the weights begin
            torch.testing.assert_close(model(alone).logits, whole(alone).logits)
        model.train()
        with pytest.raises(DataError, match="every label of this batch is -100"):
            model(input_ids=torch.tensor([[5]]), labels=torch.tensor([[5]]))

    def test_no_row_at_all(self, host: Start) -> None:
        model = host().connect()
        with torch.no_grad(), pytest.raises(DataError, match="no row, or rows of no token"):
            model(input_ids=torch.empty(0, 4, dtype=torch.int64))
        with torch.no_grad(), pytest.raises(DataError, match="no row, or rows of no token"):
            model(input_ids=torch.empty(1, 0, dtype=torch.int64))
        assert client_edge.own_layers(model)
