"""Consent is asked for once, remembered, asked for again when something changes, and can be withdrawn."""

import fcntl
import json
import os
import pty
import select
import shutil
import struct
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port, write_text
from forked import Forked
from served import ServedRun

import client_edge
from client_edge.client_check import check_client
from client_edge.command import Client
from client_edge.connection.connection import Connection
from client_edge.consent.consent import CONSENT_FILE, Consent
from client_edge.consent.gate import Gate, answers_for
from client_edge.consent_command import ConsentCommand
from client_edge.screen import screen
from splitfl.command_line import run_one
from splitfl.config.own import ClientSection, PolicySection
from splitfl.config.trees import RunConfig, ServerConfig
from splitfl.errors import NotAccepted, NotAllowed, PeerGone
from splitfl.training.forecast import READABLE


def asked(key: str = "", **sections: Any) -> Consent:
    run = RunConfig.from_tree({"model": {"model_name_or_path": "m"}, **sections}, source="test")
    return Consent.asked_for(run, run_id="run", client_id="clinic", address="tcp://127.0.0.1:1", server_key=key)


class TestRemembered:
    """What a later start compares."""

    def test_it_reads_what_it_wrote_and_only_its_owner_does(self, tmp_path: Path) -> None:
        asked().write(tmp_path / "folder")
        assert Consent.read(tmp_path / "folder") == asked()
        assert (tmp_path / "folder" / CONSENT_FILE).stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"run_id": 1}', "\xff"])
    def test_what_cannot_be_read_is_no_consent(self, tmp_path: Path, content: str) -> None:
        (tmp_path / CONSENT_FILE).write_text(content)
        assert Consent.read(tmp_path) is None

    def test_how_the_run_is_operated_may_change(self) -> None:
        assert asked().covers(asked(link={"heartbeat_timeout": 9.0}, storage={"fsync": "never"}))

    @pytest.mark.parametrize(
        ("other", "says"),
        [
            ({"model": {"model_name_or_path": "m", "bottom_layers": 2}}, "model.bottom_layers was 1, and is 2"),
            ({"optimizer": {"learning_rate": 0.5}}, "optimizer.learning_rate was 0.0002, and is 0.5"),
            ({"evaluation": {"measures": ["accuracy"]}}, "evaluation.measures was []"),
            ({"key": "k" * 40}, "the server's key was none, and is kkkk"),
        ],
    )
    def test_what_it_was_given_for_may_not(self, other: dict[str, Any], says: str) -> None:
        assert not asked().covers(asked(**other))
        assert says in "; ".join(asked().changes(asked(**other)))

    def test_what_was_withdrawn_covers_nothing(self) -> None:
        assert not asked().withdrawn().covers(asked())

    def test_values_of_a_server_cannot_steer_a_terminal(self) -> None:
        (said,) = asked().changes(asked(lora={"target_modules": ["\x1b[2J" * 500]}))
        assert said.isprintable()
        assert len(said) < 500


def test_a_key_is_shown_letter_by_letter(capsys: pytest.CaptureFixture[str]) -> None:
    answers_for(True, lambda text: screen().print(text, markup=False, highlight=False))(["the server's key is [b]:x:{"])
    assert capsys.readouterr().err == "the server's key is [b]:x:{\n"


@pytest.fixture
def serve(tmp_path: Path, make_model: Callable[..., Path]) -> Iterator[Callable[..., ServedRun]]:
    """Start a server that waits for two clients, so that one alone never trains."""
    served: list[ServedRun] = []

    def start(run_id: str = "run", **sections: dict[str, Any]) -> ServedRun:
        port = served[-1].config.server.address.rsplit(":", 1)[1] if served else free_port()
        own = {"address": f"tcp://127.0.0.1:{port}", "runs_dir": tmp_path / "runs", "run_id": run_id}
        tree = {
            "server": own | {"cache_dir": tmp_path / "cache", "export_model": False},
            "model": {"model_name_or_path": str(tmp_path / "model")} | sections.pop("model", {}),
            "federation": {"num_rounds": 1, "local_steps": 1} | sections.pop("federation", {}),
            **sections,
        }
        if not served:
            make_model()
        served.append(ServedRun(ServerConfig.from_tree(tree, source="test"), as_json=True))
        served[-1].start()
        return served[-1]

    yield start
    for each in served:
        each.stop()


@pytest.fixture
def client(tmp_path: Path) -> Callable[..., Path]:
    """Write a client's file."""

    def write(served: ServedRun, **policy: Any) -> Path:
        data = write_text(tmp_path / "text.txt", num_lines=20, seed=0)
        lines = [
            "[client]", 'client_id = "clinic"', f'server_address = "{served.config.server.address}"',
            f'output_dir = "{tmp_path}/clients"', f'cache_dir = "{tmp_path}/client-cache"',
            "[data]", f'path = "{data}"', "eval_fraction = 0.0", "[policy]",
            *(f"{name} = {json.dumps(value)}" for name, value in policy.items()),
        ]  # fmt: skip
        (tmp_path / "client.toml").write_text("\n".join(lines) + "\n")
        return tmp_path / "client.toml"

    return write


def started(capsys: pytest.CaptureFixture[str], file: Path, *more: str) -> tuple[int, str]:
    code = run_one("client", Client(), ["--config", str(file), *more])
    return code, capsys.readouterr().err


def kinds(served: ServedRun) -> list[str]:
    return [json.loads(line)["event"] for line in served.metrics_path.read_text().splitlines()]


def test_without_a_terminal_nobody_has_accepted_until_accept(
    serve: Callable[..., ServedRun], client: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = serve()
    code, said = started(capsys, client(served))
    assert code == 12
    assert READABLE in said
    assert "nobody here has accepted that" in said
    assert "--accept" in said
    assert "Traceback" not in said
    assert list((tmp_path / "clients").rglob("*.json")) == []  # nothing was fetched, written or trained
    assert not (tmp_path / "client-cache").exists()
    assert "client_joined" not in kinds(served)

    code, said = started(capsys, tmp_path / "client.toml", "--accept")
    assert (code, READABLE in said) == (0, True)
    consent = Consent.read(tmp_path / "clients" / "run" / "clinic")
    assert consent is not None
    assert (consent.run_id, consent.client_id, consent.how.split(",")[0]) == ("run", "clinic", "--accept")


def test_once_is_enough_until_something_changes(
    serve: Callable[..., ServedRun], client: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = serve()
    assert started(capsys, client(served), "--accept")[0] == 0
    served.stop()
    shutil.rmtree(served.run_dir)

    served = serve(link={"heartbeat_timeout": 9.0})  # operation
    code, said = started(capsys, tmp_path / "client.toml", "--resume", "never")
    assert (code, READABLE in said) == (0, False)
    served.stop()
    shutil.rmtree(served.run_dir)

    served = serve(evaluation={"measures": ["accuracy"]})
    code, said = started(capsys, tmp_path / "client.toml")
    assert code == 12
    assert "Changed since" in said
    assert "evaluation.measures was [], and is ['accuracy']" in said
    assert "it is not what was accepted earlier" in said


def test_a_server_that_goes_while_somebody_reads(
    serve: Callable[..., ServedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client_edge.connection.joining.JOIN_AGAIN_S", 1.0)
    served = serve()
    client = ClientSection(
        client_id="clinic", server_address=served.config.server.address, output_dir=tmp_path / "clients"
    )

    def read(_sentences: Sequence[str]) -> str:
        served.stop()
        time.sleep(1.1)
        return "read slowly"

    with pytest.raises(
        PeerGone, match=r"127.0.0.1:\d+ has gone while its settings were read .* start the same command"
    ):
        Connection(client, Gate(client, PolicySection(), read))
    consent = Consent.read(tmp_path / "clients" / "run" / "clinic")
    assert consent is not None
    assert consent.how == "read slowly"


def test_a_policy_is_before_consent(
    serve: Callable[..., ServedRun], client: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = serve(model={"bottom_layers": 0})
    code, said = started(capsys, client(served), "--accept")
    assert code == 11
    assert "model.bottom_layers = 0 (policy.min_bottom_layers = 1)" in said
    assert not (tmp_path / "client-cache").exists()
    with pytest.raises(NotAllowed, match="min_bottom_layers"):
        list(check_client(tmp_path / "client.toml", []))
    assert started(capsys, client(served, min_bottom_layers=0), "--accept")[0] == 0


def test_check_shows_what_would_be_accepted(serve: Callable[..., ServedRun], client: Callable[..., Path]) -> None:
    found = {finding.topic: finding for finding in check_client(client(serve()), [])}
    assert READABLE in found["consent"].sentences
    assert found["consent"].numbers["accepted"] is False
    assert "Your policy allows these settings." in found["policy"].sentences
    assert len(str(found["policy"].numbers["hash_of_layers"])) == 64


def test_known_weights_are_those_that_check_prints(
    serve: Callable[..., ServedRun], client: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = serve()
    found = {finding.topic: finding for finding in check_client(client(served), [])}
    assert started(capsys, client(served, known_weights="0" * 64), "--accept")[0] == 11
    assert "name it in client.model_name_or_path" in started(capsys, client(served, known_weights="own"), "--accept")[1]
    pinned = client(served, known_weights=found["policy"].numbers["hash_of_layers"])
    assert started(capsys, pinned, "--accept")[0] == 0


def test_a_bound_of_the_policy_ends_the_client_and_what_it_has_learned_is_kept(
    serve: Callable[..., ServedRun], client: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = serve(federation={"local_steps": 4, "num_rounds": 2, "step_timeout": 2.0, "wait_timeout": 60.0})
    code, said = started(capsys, client(served, max_bytes_sent=20_000), "--accept")
    assert code == 11
    assert "policy.max_bytes_sent is reached" in said
    assert "Traceback" not in said
    spent = json.loads((tmp_path / "clients" / "run" / "clinic" / "spent.json").read_text())
    assert spent["bytes_sent"] <= 21_000
    assert started(capsys, tmp_path / "client.toml")[0] == 11  # a new start is no new allowance
    assert started(capsys, client(served, max_bytes_sent=10**9))[0] == 0


def test_a_program_gets_the_text_in_the_error(serve: Callable[..., ServedRun], tmp_path: Path) -> None:
    served = serve(federation={"num_rounds": 0, "server_mode": "sequential"})
    folders = {"output_dir": tmp_path / "clients", "cache_dir": tmp_path / "client-cache"}
    with pytest.raises(NotAccepted) as refused:
        client_edge.connect(served.config.server.address, client_id="clinic", **folders)
    assert READABLE in str(refused.value)
    model = client_edge.connect(served.config.server.address, client_id="clinic", accept=True, **folders)
    client_edge.disconnect(model)
    client_edge.disconnect(client_edge.connect(served.config.server.address, client_id="clinic", **folders))
    with pytest.raises(NotAllowed, match="min_top_layers = 2"):
        client_edge.connect(served.config.server.address, client_id="clinic", policy={"min_top_layers": 2}, **folders)


class TestWithdrawing:
    """`splitfl consent withdraw`."""

    def withdraw(self, capsys: pytest.CaptureFixture[str], file: Path, *more: str) -> tuple[int, str]:
        code = run_one("consent", ConsentCommand(), ["withdraw", "--config", str(file), *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    def test_the_server_is_told_and_all_is_removed(
        self,
        serve: Callable[..., ServedRun],
        client: Callable[..., Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        served = serve(federation={"min_available_clients": 2, "wait_timeout": 60.0})
        file = client(served)
        process = Forked("client_edge", "--config", str(file), said=tmp_path / "client.said")
        folder = tmp_path / "clients" / "run" / "clinic"
        try:
            deadline = time.monotonic() + 60
            while "client_joined" not in kinds(served):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        code, said = self.withdraw(capsys, file)
        assert (code, "was told that this client does not come back" in said) == (0, True)
        assert [path.name for path in folder.iterdir()] == [CONSENT_FILE]
        deadline = time.monotonic() + 20
        while "client_left" not in kinds(served):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        run_one("consent", ConsentCommand(), ["show", "--config", str(file)])
        assert ": withdrawn 20" in capsys.readouterr().out
        code, said = started(capsys, file)
        assert (code, "was withdrawn at" in said) == (12, True)

    def test_a_server_that_is_not_there(
        self,
        serve: Callable[..., ServedRun],
        client: Callable[..., Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        served = serve()
        file = client(served)
        assert started(capsys, file, "--accept")[0] == 0
        served.stop()
        run_one("consent", ConsentCommand(), ["show", "--config", str(file), "--json"])
        (shown,) = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (shown["run_id"], shown["withdrawn_at"]) == ("run", "")
        begun_s = time.monotonic()
        code, said = self.withdraw(capsys, file)
        assert time.monotonic() - begun_s < 8
        assert (code, "could not be told" in said) == (0, True)
        assert "trying for" not in said
        assert [path.name for path in (tmp_path / "clients" / "run" / "clinic").iterdir()] == [CONSENT_FILE]
        code, said = self.withdraw(capsys, file)
        assert (code, "has consented to 0 runs (none)" in said) == (2, True)


class Terminal:
    """A client that is started on a terminal of so many columns."""

    def __init__(self, file: Path, *, columns: int = 80) -> None:
        self._end, its_end = pty.openpty()
        fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = Forked(
            "client_edge",
            "--config",
            str(file),
            said=file.with_suffix(".said"),
            env=environment | {"TERM": "xterm"},
            accepts=False,
            terminal=os.ttyname(its_end),
        )
        self._its_end: int | None = its_end
        self.shown = ""

    def answer(self, said: str, *, after_s: float = 0.0) -> tuple[int, list[str]]:
        """Answer the question when it comes; return the exit code and the lines on the screen."""
        deadline = time.monotonic() + 100
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self._end], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self._end, 4096).decode()
                except OSError:  # the other end is closed
                    break
                self._let_go()
            if said and "[y/N] " in self.shown:
                time.sleep(after_s)
                os.write(self._end, said.encode())
                said = ""
        return self.process.wait(timeout=20), self.shown.replace("\r", "").splitlines()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._let_go()
        os.close(self._end)

    def _let_go(self) -> None:
        """Close the process's end here: it has its own by now, and the terminal ends with that."""
        if self._its_end is not None:
            os.close(self._its_end)
            self._its_end = None


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(file: Path, **more: int) -> Terminal:
        started.append(Terminal(file, **more))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_a_yes_on_a_terminal_that_takes_a_while(
    serve: Callable[..., ServedRun], client: Callable[..., Path], terminal: Callable[..., Terminal]
) -> None:
    """The server has taken the silence for the end by then."""
    code, lines = terminal(client(serve())).answer("y\n", after_s=1.5)
    assert code == 0, lines
    assert "Take part, and let the server see this? [y/N] y" in lines


@pytest.mark.parametrize(
    ("said", "code", "ends"),
    [
        ("n\n", 12, "not accepted, so this client takes no part"),
        ("\n", 12, "not accepted"),
        ("yes, if it is safe\n", 12, "not accepted"),
        ("\x04", 12, "not accepted"),  # Ctrl-D
        ("\x03", 130, "interrupted"),  # Ctrl-C
    ],
)
def test_anything_but_a_yes_on_a_terminal(
    serve: Callable[..., ServedRun],
    client: Callable[..., Path],
    terminal: Callable[..., Terminal],
    tmp_path: Path,
    said: str,
    code: int,
    ends: str,
) -> None:
    served = serve()
    ended, lines = terminal(client(served), columns=60).answer(said)
    assert ended == code, lines
    (question,) = [at for at, line in enumerate(lines) if line.startswith("Take part, ")]
    assert lines[question + 1].startswith(f"splitfl client: {ends}")
    assert list((tmp_path / "clients").rglob("*.json")) == []
    assert "client_joined" not in kinds(served)
    # what is to be accepted is broken between words, and each part begins with whose it is
    text = lines[:question]
    assert all(len(line) <= 60 for line in text), text
    assert READABLE in " ".join(" ".join(text).split())
    assert sum(line.startswith("clinic: ") for line in text) == 5


def test_on_a_terminal_a_change_is_shown_as_a_difference(
    serve: Callable[..., ServedRun],
    client: Callable[..., Path],
    terminal: Callable[..., Terminal],
    capsys: pytest.CaptureFixture[str],
) -> None:
    served = serve()
    file = client(served)
    assert started(capsys, file, "--accept")[0] == 0
    served.stop()
    shutil.rmtree(served.run_dir)
    serve(evaluation={"measures": ["accuracy"]})
    code, lines = terminal(file, columns=1000).answer("n\n")
    assert code == 12
    assert lines[1].startswith("clinic: Changed since 20")
    assert lines[1].endswith(": evaluation.measures was [], and is ['accuracy'].")


def test_what_was_accepted_is_shown_later(
    serve: Callable[..., ServedRun], client: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = client(serve())
    assert started(capsys, file, "--accept")[0] == 0
    run_one("consent", ConsentCommand(), ["show", "--config", str(file)])
    assert f"  - {READABLE}\n" in capsys.readouterr().out
