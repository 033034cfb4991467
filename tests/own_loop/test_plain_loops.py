"""A torch loop of the user's own on a model from `connect`: the unsplit model's losses and weights, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_loop.host import FULL, Host, adamw, batches, differing, train, trained_of, whole_model

import client_edge
from splitfl.errors import ConfigError, DataError, ModelError, PeerGone, Refused

Start = Callable[..., Host]


def both_sides(host: Host, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Stop the server and return all that was trained."""
    mine = {name: layer.clone() for name, layer in client_edge.own_layers(model).items()}
    host.stop()
    return mine | host.backbone()


class TestParity:
    @pytest.mark.parametrize(
        ("parts", "tied", "blocks", "side", "every", "clip"),
        [
            ("lora", False, (1, 1), "right", 1, 0.5),
            ("full", True, (1, 1), "left", 2, 0.5),
            ("full", False, (0, 0), "right", 2, 0.0),
        ],
    )
    def test_with_the_unsplit_model(
        self, parts: str, tied: bool, blocks: tuple[int, int], side: str, every: int, clip: float, host: Start
    ) -> None:
        server = host(
            model={"tie_word_embeddings": tied},
            cut={"bottom_layers": blocks[0], "top_layers": blocks[1]},
            train=FULL if parts == "full" else {},
        )
        split, whole = server.connect(), whole_model(server.directory, is_lora=parts == "lora")
        given = batches(5 * every, side=side)

        split_losses = train(split, adamw(split), given, every=every, clip=clip)

        whole_losses = train(whole, adamw(whole), given, every=every, clip=clip)
        assert split_losses == whole_losses
        assert len(set(split_losses)) == len(given)
        assert [event["step"] for event in server.events("step")] == [1, 2, 3, 4, 5]
        assert differing(both_sides(server, split), trained_of(whole)) == []

    def test_any_client_optimizer_and_a_learning_rate_of_the_servers_own(self, host: Start) -> None:
        server = host(train=FULL, optimizer={"optim": "sgd", "backbone_lr": 0.02})
        split, whole = server.connect(), whole_model(server.directory, is_lora=False)
        here = [p for name, p in trained_of(whole).items() if name in client_edge.own_layers(split)]
        there = [p for name, p in trained_of(whole).items() if name not in client_edge.own_layers(split)]
        given = batches(4)

        split_losses = train(split, torch.optim.Adamax(split.parameters(), lr=5e-3), given)

        far = torch.optim.SGD(there, lr=0.02)
        near = torch.optim.Adamax(here, lr=5e-3)
        near.register_step_pre_hook(lambda *_: far.step())
        near.register_step_post_hook(lambda *_: far.zero_grad())
        assert split_losses == train(whole, near, given)
        assert {event["learning_rate"] for event in server.events("step")} == {0.02}
        assert differing(both_sides(server, split), trained_of(whole)) == []

    def test_evaluation_between_micro_batches_takes_no_step(self, host: Start) -> None:
        server = host()
        split, whole = server.connect(), whole_model(server.directory, is_lora=True)
        given = batches(3)
        for model in (split, whole):
            optimizer = adamw(model)
            model.train()
            model(**given[0]).loss.backward()
            model.eval()
            with torch.no_grad():
                model.middle = model(**given[2]).logits
            model.train()
            model(**given[1]).loss.backward()
            optimizer.step()
            model.eval()
            model.after = model(**given[2]).logits.detach()
        assert torch.equal(split.middle, whole.middle)
        assert torch.equal(split.after, whole.after)
        assert not torch.equal(split.after, split.middle)
        assert len(server.events("step")) == 1

    def test_gradient_checkpointing_sends_no_request_twice(self, host: Start) -> None:
        server = host(train=FULL)
        split, given = server.connect(), batches(3)
        whole = whole_model(server.directory, is_lora=False)
        asked: list[int] = []
        far = split.model.layers[1]._server.backbone
        far.forward, plain = lambda *args: asked.append(1) or plain(*args), far.forward
        split.activation_checkpointing_enable()
        assert train(split, adamw(split), given) == train(whole, adamw(whole), given)
        assert len(asked) == len(given)


class TestSkippedSteps:
    """What the loop does not step, the server forgets."""

    def loops(self, model: torch.nn.Module, given: list[dict[str, torch.Tensor]], how: str) -> list[float]:
        optimizer, losses = adamw(model), []
        model.train()
        for number, batch in enumerate(given):
            loss = model(**batch).loss
            if how == "zeroed after the forward":
                optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            if number % 2:
                optimizer.step()
            if how == "zeroed":
                optimizer.zero_grad()
            elif how == "zeroed in place":
                optimizer.zero_grad(set_to_none=False)
        return losses

    @pytest.mark.parametrize("how", ["zeroed", "zeroed in place", "zeroed after the forward"])
    def test_equal_the_unsplit_model(self, how: str, host: Start) -> None:
        server = host()
        split, whole = server.connect(), whole_model(server.directory, is_lora=True)
        given = batches(6)
        assert self.loops(split, given, how) == self.loops(whole, given, how)
        assert len(server.events("step")) == 3
        assert differing(both_sides(server, split), trained_of(whole)) == []

    def test_losses_without_a_backward_are_freed(self, host: Start) -> None:
        server = host()
        split, whole = server.connect(), whole_model(server.directory, is_lora=True)
        given = batches(6)
        for model in (split, whole):
            optimizer = adamw(model)
            model.train()
            model(**given[0]).loss.backward()
            model.seen = [model(**batch).loss.item() for batch in given[1:5]]
            model(**given[5]).loss.backward()
            optimizer.step()
        assert split.seen == whole.seen
        assert differing(both_sides(server, split), trained_of(whole)) == []

    def test_more_losses_that_wait_than_the_server_keeps(self, host: Start) -> None:
        split, given = host().connect(), batches(3)
        split.train()
        waiting = [split(**batch).loss for batch in given[:2]]
        with pytest.raises(ConfigError, match=r"2 losses wait for their backward, which is link\.max_in_flight"):
            split(**given[2])
        sum(waiting).backward()
        adamw(split).step()


class TestRefused:
    """What would train wrongly is refused in a sentence, and the loop can go on."""

    def after_backward(self, host: Start, **sections: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = host(**sections).connect().train()
        model(**batches(1)[0]).loss.backward()
        return model, adamw(model)

    def test_a_closure(self, host: Start) -> None:
        model, optimizer = self.after_backward(host)
        with pytest.raises(ModelError, match="stepped with a closure"):
            optimizer.step(lambda: model(**batches(1)[0]).loss)
        with pytest.raises(ModelError, match="stepped with a closure"):
            torch.optim.LBFGS(model.parameters()).step(closure=lambda: 0.0)
        optimizer.step()

    def test_a_grad_scaler(self, host: Start) -> None:
        model = host().connect().train()
        optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu")
        scaler.scale(model(**batches(1)[0]).loss).backward()
        with pytest.raises(ModelError, match="a GradScaler would scale"):
            scaler.step(optimizer)

    def test_a_grad_scaler_that_is_off_is_none(self, host: Start) -> None:
        server = host()
        model = server.connect().train()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        scaler.scale(model(**batches(1)[0]).loss).backward()
        scaler.step(adamw(model))
        server.wait_for("step")

    def test_float16(self, host: Start) -> None:
        model = host().connect().train()
        with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ModelError, match="float16 cannot train"):
            model(**batches(1)[0])

    def test_clipping_by_value_and_by_tensor(self, host: Start) -> None:
        model, optimizer = self.after_backward(host)
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-6)
        with pytest.raises(ModelError, match="cannot be clipped by value"):
            optimizer.step()
        optimizer.zero_grad()
        model(**batches(1)[0]).loss.backward()
        for number, parameter in enumerate(p for p in model.parameters() if p.grad is not None):
            parameter.grad.mul_(1 / (1 + number))
        with pytest.raises(ModelError, match="scaled by different factors"):
            optimizer.step()

    def test_clipping_between_two_backwards(self, host: Start) -> None:
        model, _ = self.after_backward(host)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        with pytest.raises(ModelError, match="clip once, just before"):
            model(**batches(1)[0]).loss.backward()

    def test_a_backward_in_eval_mode(self, host: Start) -> None:
        model = host().connect()
        with pytest.raises(ModelError, match=r"call model.train\(\) before it"):
            model(**batches(1)[0]).loss.backward()

    def test_a_second_backward(self, host: Start) -> None:
        model = host().connect().train()
        loss = model(**batches(1)[0]).loss
        loss.backward(retain_graph=True)
        with pytest.raises(Refused, match="backward was called on it before"):
            loss.backward()

    def test_router_losses(self, host: Start) -> None:
        model = host(model={"family": "mixtral"}, lora={"target_modules": ["q_proj"]}).connect().train()
        with pytest.raises(ModelError, match="the routers' auxiliary loss"):
            model(**batches(1)[0], output_router_logits=True)
        model(**batches(1)[0]).loss.backward()

    @pytest.mark.parametrize(
        ("mask", "positions"),
        [([1, 0, 1, 1], None), ([0, 1, 1, 0], None), ([0, 0, 0, 0], None), ([1, 1, 1, 1], [0, 1, 0, 1])],
        ids=["a hole", "both sides", "nothing", "packed beside a mask"],
    )
    def test_rows_that_are_none(self, mask: list[int] | None, positions: list[int] | None, host: Start) -> None:
        model = host().connect()
        given = {
            name: torch.tensor([value])
            for name, value in (("attention_mask", mask), ("position_ids", positions))
            if value
        }
        with (
            torch.no_grad(),
            pytest.raises(DataError, match=r"an attention_mask with holes|position_ids that begin anew"),
        ):
            model(input_ids=torch.tensor([[5, 6, 7, 8]]), **given)

    def test_batches_beyond_the_servers_bounds(self, host: Start) -> None:
        model = host().connect()
        with torch.no_grad():
            with pytest.raises(ConfigError, match="a batch of 9 rows, more than the 8 of this run"):
                model(input_ids=torch.full((9, 4), 5))
            with pytest.raises(ConfigError, match="rows of 65 tokens"):
                model(input_ids=torch.full((1, 65), 5))

    def test_values_that_are_not_finite(self, host: Start) -> None:
        model = host().connect().train()
        with pytest.raises(DataError, match="gradients with values that are not finite"):
            (model(**batches(1)[0]).loss * float("inf")).backward()

    def test_after_disconnecting(self, host: Start) -> None:
        model = host().connect()
        client_edge.disconnect(model)
        client_edge.disconnect(model)
        with pytest.raises(PeerGone, match="this model is disconnected"):
            model(input_ids=torch.full((1, 4), 5))

    def test_a_client_without_a_name(self, host: Start) -> None:
        with pytest.raises(ConfigError, match=r"client\.client_id is empty"):
            client_edge.connect(host().address)


def test_without_anything_to_train_below_or_on_the_server_no_gradient_travels(host: Start) -> None:
    server = host(train={"bottom": "none"}, federation={"num_rounds": 0, "server_mode": "frozen"})
    split, given = server.connect(), batches(3)
    losses = train(split, adamw(split), given)
    assert len(set(losses)) == 3
    assert server.events("step") == []
    assert not split.model.layers[1]._server.proxies.by_name
