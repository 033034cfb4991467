"""`splitfl check` says what will happen, with numbers that a run then shows, and disturbs nobody."""

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, free_port, write_text
from safetensors.torch import load_file

from client_edge.client_check import check_client
from client_edge.connection.connection import Connection
from client_edge.consent.gate import OpenGate
from client_edge.link.link import Link
from server_backbone.run_folder import search
from splitfl.command_line import main
from splitfl.config.own import ClientSection, PolicySection
from splitfl.config.reading import role_of
from splitfl.config.trees import ServerConfig
from splitfl.durability.store import Store
from splitfl.errors import DataError, ModelError, PeerGone, TransportError
from splitfl.telemetry.metrics import read_events
from splitfl.transport.keys import authorize, keygen
from splitfl.transport.reach import why_unreachable


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run `splitfl check --json`; returns exit code and what it printed."""

    def run(config: Path, *overrides: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main(["check", "--config", str(config), "--json", *(a for o in overrides for a in ("--set", o))])
        return code, json.loads(capsys.readouterr().out)

    return run


def server_file(folder: Path, model: Path, address: str, more: str = "") -> Path:
    path = folder / "server.toml"
    path.write_text(
        f"""
        [server]
        address = "{address}"
        runs_dir = "{folder}/runs"
        run_id = "run"
        cache_dir = "{folder}/cache"
        [model]
        model_name_or_path = "{model}"
        [text]
        max_seq_length = 16
        [federation]
        num_rounds = 2
        local_steps = 3
        per_device_train_batch_size = 2
        {more}
        """
    )
    return path


def client_file(folder: Path, address: str, data: Path, name: str = "looker") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(
        f"""
        [client]
        client_id = "{name}"
        server_address = "{address}"
        output_dir = "{folder}/clients"
        cache_dir = "{folder}/client-cache"
        connect_timeout = 20.0
        [data]
        path = "{data}"
        eval_fraction = 0.25
        """
    )
    return path


def until_it_listens(address: str) -> None:
    """Wait for a server: a check does not."""
    deadline = time.monotonic() + 30
    while why_unreachable(address):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def hold(monkeypatch: pytest.MonkeyPatch, step: int, until: threading.Event) -> None:
    """Have the clients of this process wait before a step, so that the run is not over before it was looked at."""
    send = Link.send_forward

    def held(self: Link, *hidden_and_layout: Any, **more: Any) -> int:
        if more["step"] == step:
            until.wait(50)
        return send(self, *hidden_and_layout, **more)

    monkeypatch.setattr(Link, "send_forward", held)


def is_in_middle(name: str) -> bool:
    return ".layers.1." in name or ".layers.2." in name


class TestServer:
    def test_it_says_which_run_a_start_goes_on_with(
        self, make_model: Callable[..., Path], tmp_path: Path, said: Callable[..., tuple[int, dict[str, Any]]]
    ) -> None:
        path = server_file(tmp_path, make_model(), f"ipc://{tmp_path}/socket")
        code, found = said(path)
        assert (code, found["run"]["goes_on"]) == (0, False)
        begun = search(ServerConfig.load(path), resumes=True).settle(found["run"]["checkpoint_sha256"])
        (begun.path / "state").mkdir(parents=True)
        begun.begin()
        code, found = said(path, "federation.num_rounds=3", "link.max_in_flight=1")
        assert (code, found["run"]["goes_on"]) == (0, True)
        assert "federation.num_rounds (was 2, is 3); link.max_in_flight (was 2, is 1)" in found["run"]["says"][1]
        code, found = said(path, "lora.r=2")
        assert code == 2
        assert "lora.r (was 8, is 2)" in found["error"]["says"]

    def test_what_it_says_is_what_the_run_does(
        self,
        make_model: Callable[..., Path],
        federate: Callable[..., Finished],
        tmp_path: Path,
        said: Callable[..., tuple[int, dict[str, Any]]],
    ) -> None:
        model = make_model()
        config = server_file(tmp_path, model, f"tcp://127.0.0.1:{free_port()}")
        code, found = said(config)
        assert code == 0
        assert not (tmp_path / "runs").exists()
        assert found["role"] == "server"
        assert found["steps"] | {"says": 0} == {"says": 0, "rounds": 2, "steps": 6, "examples_per_step": 4}
        # 4 x B x T x H x bytes a micro-batch, half of it each way
        assert found["wire"]["bytes_up_per_step"] == found["wire"]["bytes_down_per_step"] == 2 * 2 * (2 * 16 * 32 * 4)
        finished = federate(
            {
                "model": {"model_name_or_path": str(model)},
                "text": {"max_seq_length": 16},
                "federation": {"num_rounds": 2, "local_steps": 3, "per_device_train_batch_size": 2},
                "server": {"export_model": False},
            },
            {
                "clinic": {
                    "path": write_text(tmp_path / "text.txt", num_lines=8, seed=1, lengths=(20, 20)),
                    "eval_fraction": 0.0,
                }
            },
        )
        assert finished.errors == {}
        (done,) = [e for e in read_events(finished.run_dir / "metrics.jsonl") if e["event"] == "client_done"]
        traffic = 2 * found["wire"]["bytes_per_round"]
        beside = done["bytes_sent"] + done["bytes_received"] - done["bytes_of_files"] - traffic
        assert 0 < beside < 60_000  # headers, heartbeats and the two welcomes

    @pytest.mark.parametrize(("train", "federation"), [("lora", {}), ("full", {"optimizer_state": "reset"})])
    def test_what_a_copy_of_the_backbone_takes_is_what_a_run_holds(
        self,
        train: str,
        federation: dict[str, Any],
        make_model: Callable[..., Path],
        federate: Callable[..., Finished],
        tmp_path: Path,
        said: Callable[..., tuple[int, dict[str, Any]]],
    ) -> None:
        model = make_model()
        per_client = f'server_mode = "per_client"\nmin_available_clients = 2\n[train]\nbackbone = "{train}"'
        code, found = said(server_file(tmp_path, model, "inproc://copies", per_client))
        assert (code, found["copies"]["most_copies"]) == (0, 64)
        finished = federate(
            {
                "model": {"model_name_or_path": str(model)},
                "train": {"backbone": train},
                "storage": {"snapshot_steps": 3, "keep_snapshots": 0},
                "federation": {
                    "num_rounds": 2,
                    "local_steps": 2,
                    "server_mode": "per_client",
                    "min_available_clients": 2,
                    **federation,
                },
                "server": {"export_model": False},
            },
            {
                name: {"path": write_text(tmp_path / f"{name}.txt", num_lines=8, seed=1), "eval_fraction": 0.0}
                for name in ("ash", "birch")
            },
        )
        assert finished.errors == {}
        report = json.loads((finished.run_dir / "report.json").read_text())
        assert report["copies"] == {"bytes_each": found["copies"]["bytes_per_copy"], "most_at_once": 2}
        assert "a copy of what trains of the backbone" in (finished.run_dir / "report.html").read_text()
        # a snapshot in the middle of a round holds weights and moments, and no gradients, of both
        snapshots = Store.reading(finished.run_dir / "state")
        own = [
            sum(tensor.nbytes for name, tensor in snapshots.snapshot_of(number).tensors.items() if "own/" in name)
            for number in snapshots.generations()
        ]
        gradients = found["copies"]["bytes_per_copy"] // 4
        counts = 4 * len([name for name in load_file(finished.run_dir / "trained.safetensors") if is_in_middle(name)])
        assert max(own) == 2 * (3 * gradients + counts)  # AdamW's own count of steps beside each tensor

    @pytest.mark.parametrize(
        ("train", "crossings"),
        [
            ('[train]\nbottom = "none"', 3),
            ('[train]\nbottom = "none"\nbackbone = "none"', 2),
            ("[train]\nembeddings = true", 4),
        ],
    )
    def test_crossings(
        self,
        train: str,
        crossings: int,
        make_model: Callable[..., Path],
        tmp_path: Path,
        said: Callable[..., tuple[int, dict[str, Any]]],
    ) -> None:
        _, found = said(server_file(tmp_path, make_model(), "inproc://crossings", train))
        wire = found["wire"]
        assert wire["bytes_up_per_step"] + wire["bytes_down_per_step"] == crossings * 2 * (2 * 16 * 32 * 4)

    def test_in_words(
        self, make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = server_file(tmp_path, make_model(), "inproc://words")
        assert main(["check", "--config", str(config)]) == 0
        words = capsys.readouterr().out
        assert "A llama of 4 blocks: 1 below and 1 above on each client, 2 here." in words
        assert "No keys: anybody who reaches the address is let in" in words
        assert "A server that wants to can read the text and its labels" in words
        assert words.endswith("all is well\n")

    def test_who_is_let_in(
        self, make_model: Callable[..., Path], tmp_path: Path, said: Callable[..., tuple[int, dict[str, Any]]]
    ) -> None:
        keygen(tmp_path / "keys")
        authorize(tmp_path / "keys", "clinic-a", keygen(tmp_path / "clinic-a").public)
        config = server_file(tmp_path, make_model(), f"tcp://127.0.0.1:{free_port()}")
        code, found = said(config, f"server.keys={tmp_path / 'keys'}")
        assert (code, found["keys"]["authorized"]) == (0, ["clinic-a"])

    def test_an_address_in_use(
        self, make_model: Callable[..., Path], tmp_path: Path, said: Callable[..., tuple[int, dict[str, Any]]]
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            config = server_file(tmp_path, make_model(), f"tcp://127.0.0.1:{taken.getsockname()[1]}")
            code, found = said(config)
        assert (code, found["error"]["exit_code"]) == (TransportError.exit_code, 6)
        assert "is in use" in found["error"]["says"]
        assert "keys" in found  # the parts that were well are said all the same

    def test_a_model_that_cannot_be_cut_there(
        self, make_model: Callable[..., Path], tmp_path: Path, said: Callable[..., tuple[int, dict[str, Any]]]
    ) -> None:
        config = server_file(tmp_path, make_model(), "inproc://uncut")
        assert said(config, "model.top_layers=4")[0] == ModelError.exit_code


class TestClient:
    def test_a_look_at_a_run_that_goes_on_disturbs_nobody(
        self,
        make_model: Callable[..., Path],
        federate: Callable[..., Finished],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        has_looked = threading.Event()
        hold(monkeypatch, 60, has_looked)
        address = f"tcp://127.0.0.1:{free_port()}"
        data = write_text(tmp_path / "text.txt", num_lines=8, seed=1, lengths=(5, 5))
        found: dict[str, dict[str, Any]] = {}
        errors: list[Exception] = []

        def look() -> None:
            until_it_listens(address)
            try:
                for name in ("looker", "clinic"):  # a stranger, and one with the name of a client that trains
                    findings = check_client(client_file(tmp_path, address, data, name), ())
                    found[name] = {finding.topic: finding for finding in findings}
            except Exception as error:  # noqa: BLE001  # the test's to see
                errors.append(error)
            finally:
                has_looked.set()

        thread = threading.Thread(target=look)
        thread.start()
        finished = federate(
            {
                "model": {"model_name_or_path": str(make_model())},
                "federation": {"num_rounds": 30, "local_steps": 3},
                "server": {"export_model": False},
            },
            {"clinic": {"path": data}},
            address=address,
        )
        thread.join(30)
        assert finished.errors == {}
        assert errors == []
        for findings in found.values():
            numbers = findings["data"].numbers
            assert (numbers["examples"], numbers["held_out"]) == (6, 2)
            assert numbers["tokens"] == 6 * (5 + 1)  # letters and the end of the sequence
            assert numbers["epochs"] == 90 * 8 / 6
            assert findings["server"].numbers["run_id"] == "run"
            assert findings["way"].numbers["frame_bytes"] == 1 << 18
            assert "262,144 bytes went both ways" in findings["way"].sentences[0]
            assert findings["memory"].numbers["trainable"] > 0
        events = read_events(finished.run_dir / "metrics.jsonl")
        assert "looker" not in {event.get("client_id") for event in events}
        (joined,) = [event for event in events if event["event"] == "client_joined"]
        (left,) = [event for event in events if event["event"] == "client_left"]
        assert (joined["client_id"], left["client_id"], left["reason"]) == ("clinic", "clinic", "done")
        assert not [event for event in events if event["event"] in ("client_lost", "client_returned", "violation")]
        assert not (tmp_path / "clients").exists()

    def test_one_who_only_looks_is_not_waited_for(
        self,
        make_model: Callable[..., Path],
        federate: Callable[..., Finished],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A client that has said hello and nothing else is open during the whole run."""
        address = f"tcp://127.0.0.1:{free_port()}"
        is_there, is_over = threading.Event(), threading.Event()
        hold(monkeypatch, 20, is_there)
        seen: list[str] = []

        def look() -> None:
            client = ClientSection(client_id="looker", server_address=address)
            connection = Connection(client, OpenGate(client, PolicySection()))
            seen.append(connection.welcome.run_id)
            is_there.set()
            is_over.wait(60)
            connection.close()

        thread = threading.Thread(target=look)
        thread.start()
        finished = federate(
            {
                "model": {"model_name_or_path": str(make_model())},
                "federation": {"num_rounds": 20, "local_steps": 2, "wait_timeout": 40.0},
                "server": {"export_model": False},
            },
            {"clinic": {"path": write_text(tmp_path / "text.txt", num_lines=8, seed=1)}},
            address=address,
        )
        num_seen = len(seen)
        is_over.set()
        thread.join(30)
        assert finished.errors == {}
        assert num_seen == 1
        assert json.loads((finished.run_dir / "report.json").read_text())["wall_seconds"] < 20

    @pytest.mark.parametrize("packing", [True, False])
    def test_rows_and_padding_are_those_of_the_run(
        self,
        packing: bool,
        make_model: Callable[..., Path],
        federate: Callable[..., Finished],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        has_looked = threading.Event()
        hold(monkeypatch, 1, has_looked)
        address = f"tcp://127.0.0.1:{free_port()}"
        data = write_text(tmp_path / "text.txt", num_lines=60, seed=1, lengths=(2, 16))
        found: dict[str, Any] = {}

        def look() -> None:
            until_it_listens(address)
            try:
                findings = check_client(client_file(tmp_path, address, data, "clinic"), ())
                found.update({each.topic: each for each in findings})
            finally:
                has_looked.set()

        thread = threading.Thread(target=look)
        thread.start()
        finished = federate(
            {
                "model": {"model_name_or_path": str(make_model())},
                "text": {"max_seq_length": 24, "packing": packing},
                "federation": {
                    "num_rounds": 2,
                    "local_steps": 1,
                    "per_device_train_batch_size": 2,
                    "min_available_clients": 2,
                },
                "server": {"export_model": False},
            },
            {name: {"path": data, "eval_fraction": 0.25} for name in ("clinic", "other")},
            address=address,
        )
        thread.join(30)
        assert finished.errors == {}
        numbers, said = found["data"].numbers, " ".join(found["data"].sentences)
        (clinic, _) = json.loads((finished.run_dir / "report.json").read_text())["clients"]
        assert numbers["padding_share"] == pytest.approx(clinic["padding_share"])
        assert f"{numbers['padding_share']:.1%}".replace("%", " %") in said
        assert (numbers["rows"] < 45 / 2) if packing else (numbers["rows"] == 45)
        assert ("rows of packed examples" in found["steps"].sentences[0]) == packing
        assert ("of each example" in " ".join(found["consent"].sentences)) == packing

    def test_bad_data_is_found_without_a_server(
        self, tmp_path: Path, said: Callable[..., tuple[int, dict[str, Any]]]
    ) -> None:
        data = tmp_path / "text.jsonl"
        data.write_text('{"text": "planted"}\nplanted {\n')
        code, found = said(client_file(tmp_path, f"tcp://127.0.0.1:{free_port()}", data))
        assert code == DataError.exit_code
        assert "line 2: not JSON" in found["error"]["says"]
        assert "planted" not in json.dumps(found)

    def test_no_server(self, tmp_path: Path, said: Callable[..., tuple[int, dict[str, Any]]]) -> None:
        data = write_text(tmp_path / "text.txt", num_lines=3, seed=1)
        config = client_file(tmp_path, f"tcp://127.0.0.1:{free_port()}", data)
        code, found = said(config, "client.connect_timeout=0.5")
        assert code == PeerGone.exit_code
        assert found["files"]["says"] == [f"{data} can be read, and so can the held-out files."]
        assert "is the server running" in found["error"]["says"]


def test_whose_file_it_is(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[data]\n")
    assert role_of(config) == "client"
    config.write_text("seed = 3\n")
    assert role_of(config) == "server"
    assert role_of(config, ["client.client_id=clinic"]) == "client"
