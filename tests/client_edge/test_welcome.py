"""A welcome that lies in one thing is refused before anything of it is used; a true one is read."""

import dataclasses
import json
from typing import Any

import pytest

from client_edge.connection.heard import MOST_CHARACTERS, heard
from client_edge.connection.welcome import check_welcome, settings_of
from splitfl.config.trees import RunConfig
from splitfl.errors import RemoteProtocolError
from splitfl.protocol import codec
from splitfl.protocol.messages import Pong, Refusal, Welcome

RUN = RunConfig.from_tree({"seed": 7, "model": {"model_name_or_path": "tiny"}}, source="test")
DIGEST = "0" * 64


def welcome(**changed: Any) -> Welcome:
    usual: dict[str, Any] = {
        "session": "5f" * 16,
        "session_number": 1,
        "run_id": "20261130-101112",
        "settings": RUN.to_json(),
        "fingerprint": RUN.fingerprint(),
        "file_names": ("config.json", "client.safetensors"),
        "file_sizes": (500, 10_000),
        "file_hashes": (DIGEST, DIGEST),
        "limits": {"message_bytes": 1e6, "packed_examples": 0.0},
    }
    return Welcome(**{**usual, **changed})


def settings(**sections: Any) -> dict[str, Any]:
    """Return the settings with these laid over them, and the fingerprint of what is sent."""
    tree = json.loads(RUN.to_json())
    for name, section in sections.items():
        tree[name] |= section
    return {"settings": json.dumps(tree)}


def test_a_true_one_is_read() -> None:
    check_welcome(welcome())
    assert settings_of(welcome()) == RUN


LIES: dict[str, dict[str, Any]] = {
    "an absolute path as run": {"run_id": "/srv/outside"},
    "a path upwards": {"run_id": "../../outside"},
    "the folder above": {"run_id": ".."},
    "no run": {"run_id": ""},
    "a line's end after the name": {"run_id": "run\n"},
    "a name too long": {"run_id": "a" * 65},
    "a path as hash": {"file_hashes": ("/etc/passwd", DIGEST)},
    "a hash in capitals": {"file_hashes": (DIGEST, "A" * 64)},
    "a hash with a path after it": {"file_hashes": (DIGEST, DIGEST + "/../../x")},
    "a hash too few": {"file_hashes": (DIGEST,)},
    "a size too few": {"file_sizes": (500,)},
    "a file of another name": {
        "file_names": ("config.json", "client.safetensors", "modeling.py"),
        "file_sizes": (1, 1, 1),
        "file_hashes": (DIGEST,) * 3,
    },
    "a file twice": {
        "file_names": ("config.json", "client.safetensors", "config.json"),
        "file_sizes": (1, 1, 1),
        "file_hashes": (DIGEST,) * 3,
    },
    "no weights": {"file_names": ("config.json",), "file_sizes": (1,), "file_hashes": (DIGEST,)},
    "no config": {"file_names": ("client.safetensors",), "file_sizes": (1,), "file_hashes": (DIGEST,)},
    "a config without end": {"file_sizes": (1 << 40, 1)},
    "a token that is a text": {"session": "a b"},
    "a token without end": {"session": "a" * 5000},
    "a fingerprint that is none": {"fingerprint": "../x"},
    "a limit that is negative": {"limits": {"message_bytes": -1.0}},
    "a limit that is NaN": {"limits": {"packed_examples": float("nan")}},
    "a limit that is infinite": {"limits": {"cache_seconds": float("inf")}},
    "a limit that no header keeps": {"limits": {"message_bytes": 10.0}},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused(lie: str) -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        check_welcome(welcome(**LIES[lie]))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": "no json"},
        {"settings": "[" * 60_000},
        {"settings": "[]"},
        {"settings": '{"seed": NaN}'},
        {"settings": "{}"},
        settings(optimizer={"learning_rate": 1e999}),
        settings(optimizer={"learning_rate": -1.0}),
        settings(link={"max_rms": "\x1b[2J"}),
        settings(model={"nonesuch\x1b[2J" * 5000: 1}),
        settings(model={"model_name_or_path": "\x1b]0;owned\x07"}),
        settings(model={"model_name_or_path": "m" * 5000}),
        settings(federation={"num_rounds": True}),
    ],
    ids=str,
)
def test_settings_that_are_none_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        settings_of(welcome(**changed))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600


def test_what_a_server_says_cannot_steer_a_terminal() -> None:
    hostile = "\x1b[31mall is well\x07\n" * 1000
    for message in (
        Refusal(code="OVER", reason=hostile),
        Pong(number=1, waiting_for=hostile, bytes_sent=0, bytes_received=0),
    ):
        got = heard(codec.encode(message), max_frame_bytes=1 << 20)
        (text,) = [value for value in dataclasses.asdict(got).values() if isinstance(value, str) and len(value) > 9]
        assert text.isprintable()
        assert len(text) <= MOST_CHARACTERS
