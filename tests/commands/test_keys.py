"""`keygen`, `authorize`, `revoke` as the operator and the clinic use them, and what they refuse."""

import json
import os
import stat
from pathlib import Path

import pytest

from splitfl.command_line import run_one
from splitfl.commands.keys import Authorize, Keygen, Revoke
from splitfl.errors import ConfigError
from splitfl.transport.keys import AllowList, _new_pair, authorize, keygen, read_enrolment, read_key_pair

ADDRESS = "tcp://gpu-box:5555"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = os.umask(0)
    try:
        assert run_one("keygen", Keygen(), [str(tmp_path / "server")]) == 0
        assert run_one("keygen", Keygen(), [str(tmp_path / "clinic"), "--json"]) == 0
    finally:
        os.umask(old)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["public_key"] == read_key_pair(tmp_path / "clinic").public
    assert mode_of(tmp_path / "clinic" / "secret.key") == 0o600
    assert mode_of(tmp_path / "clinic") == 0o700

    enrolment = tmp_path / "clinic.toml"
    public = str(tmp_path / "clinic" / "public.key")
    arguments = [str(tmp_path / "server"), "clinic-a", public, "--address", ADDRESS, "--enrolment", str(enrolment)]
    assert run_one("authorize", Authorize(), arguments) == 0
    enrolled = read_enrolment(enrolment)
    assert (enrolled.server_address, enrolled.client_id) == (ADDRESS, "clinic-a")
    assert enrolled.server_public_key == read_key_pair(tmp_path / "server").public
    assert enrolled.pinned == {"clinic-a": printed["public_key"]}
    known = AllowList(tmp_path / "server")
    assert known.client_of(printed["public_key"]) == "clinic-a"

    assert run_one("revoke", Revoke(), [str(tmp_path / "server"), "clinic-a"]) == 0
    assert known.refresh()
    assert not known.refresh()
    assert known.client_of(printed["public_key"]) is None
    secret = (tmp_path / "clinic" / "secret.key").read_text().strip()
    said = capsys.readouterr()
    assert secret not in said.out + said.err


def test_a_key_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = keygen(tmp_path / "keys")
    assert run_one("keygen", Keygen(), [str(tmp_path / "keys")]) == 2
    assert "exists: a key is never overwritten" in capsys.readouterr().err
    assert read_key_pair(tmp_path / "keys") == before


def test_no_public_key_looks_like_an_option() -> None:
    """One in 85 would, and `splitfl authorize` takes it as an argument."""
    assert not any(_new_pair()[0].startswith("-") for _ in range(1000))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    keygen(tmp_path / "keys")
    (tmp_path / "keys" / "secret.key").chmod(mode)
    with pytest.raises(ConfigError, match=r"(?s)may be used by others .*run `chmod 600"):
        read_key_pair(tmp_path / "keys")


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    keygen(tmp_path / "keys")
    (tmp_path / "keys").chmod(0o755)
    with pytest.raises(ConfigError, match=r"chmod 700"):
        read_key_pair(tmp_path / "keys")


def test_a_key_has_one_name_and_a_name_one_key(tmp_path: Path) -> None:
    keygen(tmp_path / "server")
    one, two = keygen(tmp_path / "one").public, keygen(tmp_path / "two").public
    authorize(tmp_path / "server", "a", one)
    with pytest.raises(ConfigError, match="authorised as a already"):
        authorize(tmp_path / "server", "b", one)
    authorize(tmp_path / "server", "a", two)
    known = AllowList(tmp_path / "server")
    assert (known.client_of(one), known.client_of(two)) == (None, "a")


@pytest.mark.parametrize("content", ["", "short", "x" * 41, "\x00" * 40, "ü" * 40])
def test_a_malformed_file_lets_nobody_in(tmp_path: Path, content: str) -> None:
    keygen(tmp_path / "server")
    authorize(tmp_path / "server", "a", keygen(tmp_path / "a").public)
    (tmp_path / "server" / "authorized" / "b.key").write_text(content)
    known = AllowList(tmp_path / "server")
    assert list(known.keys()) == ["a"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonesuch", "a", "x" * 40, "--address", ADDRESS], "no such file"),
        (["server", "../up", "KEY", "--address", ADDRESS], "client name"),
        (["server", "a", "no key", "--address", ADDRESS], "neither a public key"),
        (["server", "a", "KEY", "--address", "gpu-box"], "write one of"),
    ],
)
def test_what_authorize_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    public = keygen(tmp_path / "server").public
    folder, *rest = (public if argument == "KEY" else argument for argument in arguments)
    code = run_one("authorize", Authorize(), [str(tmp_path / folder), *rest, "--enrolment", str(tmp_path / "e.toml")])
    assert code in (2, 6)
    assert says in capsys.readouterr().err
    assert not (tmp_path / "e.toml").exists()


def test_revoking_who_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keygen(tmp_path / "server")
    assert run_one("revoke", Revoke(), [str(tmp_path / "server"), "a"]) == 2
    assert "a is not authorised" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[server]", "[server]\naddress = 1", "not toml ["])
def test_an_enrolment_file_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "e.toml").write_text(text)
    with pytest.raises(ConfigError, match="enrolment"):
        read_enrolment(tmp_path / "e.toml")
