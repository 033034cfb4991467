"""`per_client` with own-loop clients: each has a backbone to itself, which nobody waits for and nothing merges."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_loop.host import FULL, Host, adamw, batches, differing, train, trained_of, whole_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import client_edge
from server_backbone.replay import replay
from splitfl.errors import ConfigError, Refused
from splitfl.models.export import export_run, trained_file

Start = Callable[..., Host]
PER_CLIENT = {"num_rounds": 0, "server_mode": "per_client"}


def copy_of(server: Host, client_id: str) -> dict[str, torch.Tensor]:
    return load_file(server.run_dir / trained_file(client_id))


@pytest.mark.parametrize("sections", [{}, {"train": FULL}], ids=["lora", "full"])
def test_each_client_is_an_unsplit_model_of_its_own(host: Start, sections: dict[str, Any]) -> None:
    """Their micro-batches and steps overlap in every way that two can."""
    server = host(federation=PER_CLIENT, **sections)
    models = {name: server.connect(name) for name in ("a", "b")}
    optimizers = {name: adamw(model) for name, model in models.items()}
    given = {"a": batches(6), "b": batches(6, rows=2, length=8)}
    for number in range(0, 6, 2):
        for model in models.values():
            model.train()
        # forwards of both before a backward of either, and a step of one under the other's graph
        losses = {name: model(**given[name][number]).loss for name, model in models.items()}
        losses["a"].backward()
        late = models["a"](**given["a"][number + 1]).loss
        losses["b"].backward()
        optimizers["b"].step()
        optimizers["b"].zero_grad()
        late.backward()
        torch.nn.utils.clip_grad_norm_(models["a"].parameters(), 0.5)
        optimizers["a"].step()
        optimizers["a"].zero_grad()
    layers = {
        name: {key: value.clone() for key, value in client_edge.own_layers(model).items()}
        for name, model in models.items()
    }
    server.stop()
    for name, every, clip, used in (("a", 2, 0.5, given["a"]), ("b", 1, 0.0, given["b"][::2])):
        whole = whole_model(server.directory, is_lora=not sections)
        optimizer = adamw(whole)
        whole.train()
        for number, batch in enumerate(used, start=1):
            whole(**batch, use_cache=False).loss.backward()
            if number % every == 0:
                if clip:
                    torch.nn.utils.clip_grad_norm_(whole.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        assert differing(layers[name] | copy_of(server, name), trained_of(whole)) == []


def test_a_client_goes_back_beside_others_that_train(host: Start) -> None:
    server = host(federation=PER_CLIENT, storage={"keep_snapshots": 0, "snapshot_steps": 2, "fsync": "never"})
    mine, others = server.connect("mine"), server.connect("others")
    given = batches(4)
    optimizer, theirs = adamw(mine), adamw(others)
    train(others, theirs, given[:1])
    train(mine, optimizer, given[:2])
    state = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    expected = logits(mine, given[3])
    train(others, theirs, given[1:])
    of_others = logits(others, given[3])
    train(mine, optimizer, given)
    mine.load_state_dict(state)
    assert torch.equal(logits(mine, given[3]), expected)
    assert torch.equal(logits(others, given[3]), of_others)
    train(mine, adamw(mine), given[:1])
    server.stop()
    assert replay(server.run_dir).problems == []
    server.start()
    again = server.connect("mine")
    again.load_state_dict(state)
    assert torch.equal(logits(again, given[3]), expected)
    assert [event["client_id"] for event in server.events("went_back")] == ["mine", "mine"]


def test_nobody_goes_back_to_another_clients_step(host: Start) -> None:
    server = host(federation=PER_CLIENT)
    mine, others = server.connect("mine"), server.connect("others")
    train(others, adamw(others), batches(1))
    state = {name: tensor.clone() for name, tensor in others.state_dict().items()}
    train(mine, adamw(mine), batches(2))
    with pytest.raises(Refused, match="commit 1 is another client's"):
        mine.load_state_dict(state)


def test_exports_one_clients_model(host: Start, tmp_path: Path) -> None:
    server = host(federation=PER_CLIENT, train=FULL)
    model, given = server.connect("ash"), batches(2)
    train(model, adamw(model), given)
    expected = logits(model, given[0])
    own = {name: layer.clone() for name, layer in client_edge.own_layers(model).items()}
    server.stop()
    for named, text in (("", r"name one of ash with --client"), ("oak", "name one of ash with --client")):
        with pytest.raises(ConfigError, match=text):
            export_run(server.run_dir, tmp_path / "nothing", client_id=named)
    save_file({**copy_of(server, "ash"), **own}, server.run_dir / trained_file("ash"))
    whole = AutoModelForCausalLM.from_pretrained(export_run(server.run_dir, tmp_path / "whole", client_id="ash"))
    assert torch.equal(logits(whole, given[0]), expected)


def test_more_clients_than_the_server_has_room_for_are_refused(host: Start) -> None:
    """Clients that have left count as well: their copies are kept for when they come back."""
    server = host(federation=PER_CLIENT, server={"max_clients": 2})
    for name in ("a", "b"):
        client_edge.disconnect(server.connect(name))
    with pytest.raises(Refused, match="keeps a copy of the backbone for each of 2 clients"):
        server.connect("c")
    server.connect("a")


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch).logits
