"""Of a user's own loop no token, label or logit crosses the wire either."""

from collections.abc import Callable

import torch
from conftest import ALLOWS_ALL, free_port
from own_loop.host import FULL, Host, adamw, batches, train
from test_wire import Recorder, Secrets

import client_edge


def test_no_secret_crosses(host: Callable[..., Host]) -> None:
    server = host(train=FULL)
    port = free_port()
    secrets, activations = Secrets(), []
    with Recorder(port, int(server.address.rsplit(":", 1)[1])).running() as recorder:
        folders = {"output_dir": server.folder / "clients", "cache_dir": server.folder / "cache"}
        model = client_edge.connect(
            f"tcp://127.0.0.1:{port}", client_id="clinic", accept=True, policy=ALLOWS_ALL, **folders
        )
        model.model.layers[1].register_forward_pre_hook(lambda _, args: activations.append(args[0].detach()))
        model.register_forward_hook(lambda *found: secrets.add_logits(found[-1].logits))
        given = batches(4, length=24)
        for batch in given:
            for ids, length in zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(dim=1), strict=True):
                secrets.add_ids(ids[:length], "token ids")
        train(model, adamw(model), given[:3], clip=0.5)
        model.eval()
        with torch.no_grad():
            model(**given[3])
        model.state_dict()
        client_edge.disconnect(model)
    assert len(secrets.needles) > 300
    assert secrets.found_in(recorder.streams) == []
    # the net has no hole: what may cross is seen to cross
    assert len(activations) == 4
    seen = [each[0, 0].numpy().tobytes() for each in activations]
    assert all(any(row in stream for stream in recorder.streams) for row in seen)
