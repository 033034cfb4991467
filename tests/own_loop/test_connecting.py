"""What `connect` takes, and what is left of a run when it is over."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from own_loop.host import FULL, Host, adamw, batches, train
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import client_edge
from splitfl.errors import ConfigError, ModelError
from splitfl.models.export import export_run
from splitfl.transport import keys

Start = Callable[..., Host]


def test_the_model_is_of_its_original_class_and_leaves_when_it_is_forgotten(host: Start) -> None:
    server = host()
    model = server.connect()
    assert type(model) is LlamaForCausalLM
    assert not model.training
    del model
    gc.collect()
    server.wait_for("client_left")
    assert server.events("client_left")[0]["reason"] == "disconnected"


def test_from_a_clients_file_with_settings_over_it(host: Start, tmp_path: Path) -> None:
    server = host()
    file = tmp_path / "client.toml"
    file.write_text(
        f'[client]\nclient_id = "clinic"\nserver_address = "{server.address}"\noutput_dir = "{tmp_path}/out"\n',
        encoding="utf-8",
    )
    client_edge.disconnect(client_edge.connect(config=file, accept=True))
    client_edge.disconnect(
        client_edge.connect(config=file, client_id="other", cache_dir=tmp_path / "cache", accept=True)
    )
    assert [event["client_id"] for event in server.events("client_joined")] == ["clinic", "other"]


@pytest.mark.slow
def test_with_keys_and_the_enrolment_file_beside_them(host: Start, tmp_path: Path) -> None:
    theirs, mine = tmp_path / "server-keys", tmp_path / "client-keys"
    server_pair, client_pair = keys.keygen(theirs), keys.keygen(mine)
    keys.authorize(theirs, "clinic", client_pair.public)
    server = host(server={"keys": theirs})
    with pytest.raises(ConfigError, match=r"clinic\.enrolment\.toml"):
        server.connect(keys=mine)
    keys.write_enrolment(
        mine / "clinic.enrolment.toml",
        keys.Enrolment(
            server_address=server.address,
            server_public_key=server_pair.public,
            client_id="clinic",
            client_public_key=client_pair.public,
            pinned=keys.AllowList(theirs).keys(),
        ),
    )
    model = server.connect(keys=mine)
    train(model, adamw(model), batches(1))
    assert len(server.events("step")) == 1


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"client\.batch_size"):
        client_edge.connect("tcp://127.0.0.1:1", client_id="clinic", batch_size=3)


def test_a_model_from_elsewhere_cannot_be_disconnected() -> None:
    with pytest.raises(ModelError, match=r"a Linear that is not from client_edge\.connect"):
        client_edge.disconnect(torch.nn.Linear(1, 1))


def test_both_sides_parts_make_the_whole_model(host: Start, tmp_path: Path) -> None:
    server = host(train=FULL)
    model, given = server.connect(), batches(3)
    train(model, adamw(model), given)
    model.eval()
    with torch.no_grad():
        expected = model(**given[0]).logits
    trained = server.run_dir / "trained.safetensors"
    server.stop()
    save_file({**server.backbone(), **client_edge.own_layers(model)}, trained)
    whole = AutoModelForCausalLM.from_pretrained(export_run(server.run_dir, tmp_path / "whole")).eval()
    with torch.no_grad():
        assert torch.equal(whole(**given[0]).logits, expected)
