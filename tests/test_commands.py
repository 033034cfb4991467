"""Bad input gets one clear sentence and a documented exit code, and leaves nothing half-written."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished, free_port, tiny_config, tiny_tokenizer, write_text

from client_edge.command import Client
from server_backbone.command import Server
from splitfl.command_line import main, run_one
from splitfl.protocol import codec
from splitfl.protocol.messages import WIRE_VERSION, Hello, Refusal
from splitfl.transport.zeromq import Endpoint, Listener


def link(address: str, kind: type) -> Endpoint | Listener:
    return kind(address, max_frame_bytes=1 << 20, heartbeat_interval=2.0, heartbeat_timeout=10.0)


@pytest.fixture
def serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run `splitfl server` with these settings in this process; returns exit code and what it said."""

    def run(*overrides: str, config: str = "") -> tuple[int, str]:
        file = tmp_path / "server.toml"
        file.write_text(config)
        sets = [f"server.runs_dir={tmp_path}/runs", f"server.cache_dir={tmp_path}/cache", *overrides]
        code = run_one("server", Server(), ["--config", str(file), *(a for s in sets for a in ("--set", s))])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def take_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run `splitfl client` likewise."""

    def run(*overrides: str) -> tuple[int, str]:
        sets = ["client.client_id=clinic", f"client.output_dir={tmp_path}/clients", *overrides]
        file = tmp_path / "client.toml"
        file.write_text("")
        code = run_one("client", Client(), ["--config", str(file), *(a for s in sets for a in ("--set", s))])
        return code, capsys.readouterr().err

    return run


class TestServer:
    """Mistakes that an operator may make."""

    def test_no_such_config(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_one("server", Server(), ["--config", "nowhere.toml"]) == 2
        assert "nowhere.toml: no such file" in capsys.readouterr().err

    def test_unknown_setting_names_the_nearest(self, serve: Callable[..., tuple[int, str]]) -> None:
        code, said = serve(config='[model]\nmodel_name_or_path = "x"\n[federation]\nnum_round = 3\n')
        assert (code, said.count("\n")) == (2, 1)
        assert "unknown setting federation.num_round; did you mean federation.num_rounds?" in said

    def test_no_model(self, serve: Callable[..., tuple[int, str]]) -> None:
        code, said = serve()
        assert code == 2
        assert "model.model_name_or_path is empty" in said

    @pytest.mark.parametrize("content", ['{"model_type": "nonesuch"}', '{"model_type": "t5"}', "{}", "no json"])
    def test_unknown_family(self, serve: Callable[..., tuple[int, str]], tmp_path: Path, content: str) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(content)
        code, said = serve(f"model.model_name_or_path={tmp_path}/model", "server.address=inproc://a")
        assert code == 4
        assert "config.json" in said
        assert said.count("\n") == 1
        assert not (tmp_path / "runs").exists()

    def test_code_of_its_own_is_refused(self, serve: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}')
        code, said = serve(f"model.model_name_or_path={tmp_path}/model", "server.address=inproc://b")
        assert (code, "brings its own code" in said) == (4, True)

    def test_cannot_be_cut_there(
        self, serve: Callable[..., tuple[int, str]], make_model: Callable[..., Path], tmp_path: Path
    ) -> None:
        directory = make_model("llama")
        settings = (f"model.model_name_or_path={directory}", "model.top_layers=4", "server.address=inproc://c")
        code, said = serve(*settings)
        assert code == 4
        assert "llama has 4 blocks: bottom_layers + top_layers = 1 + 4 must leave at least one" in said
        assert not (tmp_path / "runs").exists()

    def test_rows_longer_than_the_positions(
        self, serve: Callable[..., tuple[int, str]], make_model: Callable[..., Path], tmp_path: Path
    ) -> None:
        settings = (f"model.model_name_or_path={make_model('gpt2')}", "text.max_seq_length=65")
        code, said = serve(*settings, "server.address=inproc://e")
        assert code == 2
        assert "max_seq_length = 65, but this gpt2 has positions for 64 tokens: set it to 64 or less" in said
        assert not (tmp_path / "runs").exists()

    def test_a_checkpoint_without_weights(self, serve: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
        tiny_config("llama").save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        code, said = serve(f"model.model_name_or_path={tmp_path}/model", "server.address=inproc://d")
        assert (code, "lacks model.safetensors; save the model with save_pretrained" in said) == (4, True)

    def test_port_in_use(
        self, serve: Callable[..., tuple[int, str]], make_model: Callable[..., Path], tmp_path: Path
    ) -> None:
        address = f"tcp://127.0.0.1:{free_port()}"
        with link(address, Listener):
            code, said = serve(f"model.model_name_or_path={make_model()}", f"server.address={address}")
        assert code == 6
        assert f"address {address} is in use" in said
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize(
        "address", ["tcp://0.0.0.0:5555", "tcp://192.0.2.1:5555", "tcp://*:5555", "tcp://gpu-box:1"]
    )
    def test_addresses_beyond_this_machine_are_refused(
        self, serve: Callable[..., tuple[int, str]], address: str, tmp_path: Path
    ) -> None:
        code, said = serve("model.model_name_or_path=x", f"server.address={address}")
        assert code == 6
        assert "there are no keys" in said
        assert not (tmp_path / "runs").exists()

    def test_a_run_is_not_overwritten(self, serve: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
        (tmp_path / "runs" / "mine").mkdir(parents=True)
        (tmp_path / "runs" / "mine" / "config.toml").write_text('[model]\nmodel_name_or_path = "x"\n')
        (tmp_path / "runs" / "mine" / "finished").touch()
        code, said = serve("model.model_name_or_path=x", "server.run_id=mine")
        assert (code, "holds a finished run" in said) == (2, True)

    def test_an_interrupted_run_is_not_gone_on_with_under_other_settings(
        self, serve: Callable[..., tuple[int, str]], tmp_path: Path
    ) -> None:
        (tmp_path / "runs" / "mine").mkdir(parents=True)
        (tmp_path / "runs" / "mine" / "config.toml").write_text('seed = 1\n[model]\nmodel_name_or_path = "x"\n')
        code, said = serve("model.model_name_or_path=x", "server.run_id=mine", "seed=2")
        assert (code, "other settings, which decide its weights: seed (was 1, is 2)" in said) == (2, True)

    def test_nobody_comes(
        self, serve: Callable[..., tuple[int, str]], make_model: Callable[..., Path], tmp_path: Path
    ) -> None:
        settings = ("federation.wait_timeout=0.5", "federation.min_available_clients=2", "server.run_id=mine")
        code, said = serve(f"model.model_name_or_path={make_model()}", "server.address=inproc://e", *settings)
        assert code == 9
        assert "waited 0.5 s (federation.wait_timeout) for 2 clients; ready: none" in said
        report = json.loads((tmp_path / "runs" / "mine" / "report.json").read_text())
        assert report["complete"] is False


class TestClient:
    """What the clinic's IT person may get wrong."""

    def test_missing_data(self, take_part: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
        code, said = take_part(f"data.path={tmp_path}/none.jsonl")
        assert (code, said.count("\n")) == (3, 1)
        assert "none.jsonl" in said

    @pytest.mark.parametrize(
        ("content", "says"),
        [("", "empty"), ('{"text": "planted"}\nplanted {\n', "line 2: not JSON"), ("[1]\n", "line 1")],
    )
    def test_malformed_data_is_found_before_joining(
        self, take_part: Callable[..., tuple[int, str]], tmp_path: Path, content: str, says: str
    ) -> None:
        (tmp_path / "text.jsonl").write_text(content)
        code, said = take_part(f"data.path={tmp_path}/text.jsonl")
        assert code == 3
        assert says in said
        assert "planted" not in said
        assert not (tmp_path / "clients").exists()

    def test_no_server(self, take_part: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
        address = f"tcp://127.0.0.1:{free_port()}"
        data = write_text(tmp_path / "text.txt", num_lines=3, seed=1)
        begun = time.monotonic()
        settings = (f"data.path={data}", f"client.server_address={address}", "client.connect_timeout=1")
        code, said = take_part(*settings)
        assert code == 7
        assert f"no answer from {address} after 1 s" in said
        assert time.monotonic() - begun < 5

    def test_bad_name(self, take_part: Callable[..., tuple[int, str]]) -> None:
        code, said = take_part("client.client_id=../up")
        assert (code, "client.client_id" in said) == (2, True)


def test_another_wire_version_is_refused_with_both(
    make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> None:
    """A stranger's refusal, beside a run that goes on."""
    address = f"tcp://127.0.0.1:{free_port()}"
    refusals: list[str] = []

    def say(wire_version: int, client_id: str) -> None:
        with link(address, Endpoint) as endpoint:
            endpoint.send(codec.encode(Hello(wire_version=wire_version, software="test", client_id=client_id)))
            frames = endpoint.recv(20.0)
            assert frames is not None
            match codec.decode(frames, max_frame_bytes=1 << 20):
                case Refusal(reason=reason):
                    refusals.append(reason)

    def disturb() -> None:
        say(WIRE_VERSION + 1, "new")

    thread = threading.Thread(target=disturb)
    thread.start()
    data = write_text(tmp_path / "text.txt", num_lines=20, seed=1)
    finished = federate(
        {
            "model": {"model_name_or_path": str(make_model())},
            "federation": {"num_rounds": 10, "local_steps": 3},
            "server": {"export_model": False},
        },
        {"clinic": {"path": data}},
        address=address,
    )
    thread.join(30)
    assert finished.errors == {}
    assert f"wire version {WIRE_VERSION} and this client {WIRE_VERSION + 1}" in refusals[0]


def test_export_refuses_what_is_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from splitfl.commands.export import Export

    assert run_one("export", Export(), [str(tmp_path), str(tmp_path / "out")]) == 2
    assert "not a run's folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("client", "demo", "export", "server", "simulate"))
