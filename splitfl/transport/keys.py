"""Keys on disk: a side's own pair, the clients a server lets in, and the file that enrols a client.

A key is a CURVE25519 key in Z85 (https://rfc.zeromq.org/spec/32): 40 characters. The identity of a client is its key;
its name is the one that the server's operator has given to the key.
"""

import errno
import logging
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tomlkit
import zmq

from splitfl.config.patterns import NAME_PATTERN
from splitfl.errors import ConfigError

log = logging.getLogger(__name__)

SECRET_FILE = "secret.key"  # noqa: S105  # a file name
PUBLIC_FILE = "public.key"
AUTHORIZED_DIR = "authorized"
_SUFFIX = ".key"
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """One side's key pair."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """The operator's word to a client about the server; nothing in it is secret."""

    server_address: str
    server_public_key: str
    client_id: str
    client_public_key: str
    pinned: Mapping[str, str]
    """Public keys of all clients authorised when it was written, by name."""


def keygen(folder: Path) -> KeyPair:
    """Make a key pair in a folder that only this user may enter; raise `ConfigError` if there is one."""
    _check_system()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder for the keys")
    public, secret = _new_pair()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        _write_new(folder / SECRET_FILE, secret, 0o600)
        _write_new(folder / PUBLIC_FILE, public, 0o644)
    except FileExistsError as error:
        raise ConfigError(
            f"{error.filename} exists: a key is never overwritten; name another folder, or remove it if nobody"
            " knows that key"
        ) from None
    except OSError as error:
        raise ConfigError(f"{folder}: no key could be written: {error.strerror}") from None
    return KeyPair(public=public, secret=secret)


def _new_pair() -> tuple[str, str]:
    """Return a public and a secret key; the public one is an argument of `splitfl authorize`, so no option's dash."""
    while True:
        public, secret = (key.decode() for key in zmq.curve_keypair())
        if not public.startswith("-"):
            return public, secret


def read_key_pair(folder: Path) -> KeyPair:
    """Read a key pair; raise `ConfigError` if it is missing, malformed, or if others may read the secret."""
    _check_system()
    secret = folder / SECRET_FILE
    for path, widest in ((folder, 0o700), (secret, 0o600)):
        _check_private(path, widest)
    pair = KeyPair(public=read_public_key(folder / PUBLIC_FILE), secret=_read_key(secret))
    if zmq.curve_public(pair.secret.encode()).decode() != pair.public:
        raise ConfigError(f"{folder}: {PUBLIC_FILE} does not belong to {SECRET_FILE}: make both anew in another folder")
    return pair


def read_public_key(path: Path) -> str:
    """Read a public key's file."""
    return _read_key(path)


def parse_public_key(text: str) -> str:
    """Return a public key given as text or as the path of its file; raise `ConfigError` when it is neither."""
    if _KEY.fullmatch(text):
        return text
    if Path(text).is_file():
        return read_public_key(Path(text))
    raise ConfigError(f"{text[:60]!r} is neither a public key of 40 characters nor the path of a {PUBLIC_FILE}")


def authorize(folder: Path, client_id: str, public_key: str) -> None:
    """Let a client in from now on, on running servers too; its former key, if it had one, is let in no longer."""
    _check_name(client_id)
    known = AllowList(folder)
    owner = known.client_of(public_key)
    if owner is not None and owner != client_id:
        raise ConfigError(f"this key is authorised as {owner} already: a client has one name; revoke that first")
    directory = folder / AUTHORIZED_DIR
    try:
        directory.mkdir(exist_ok=True, mode=0o700)
        half = directory / f".{client_id}.partial"
        half.unlink(missing_ok=True)
        _write_new(half, public_key, 0o600)
        half.replace(directory / f"{client_id}{_SUFFIX}")
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written: {error.strerror}") from None


def revoke(folder: Path, client_id: str) -> None:
    """Let a client in no longer, running servers included; raise `ConfigError` if it is not let in anyhow."""
    _check_name(client_id)
    try:
        (folder / AUTHORIZED_DIR / f"{client_id}{_SUFFIX}").unlink()
    except FileNotFoundError:
        known = ", ".join(AllowList(folder).keys()) or "none"
        raise ConfigError(f"{client_id} is not authorised in {folder}; authorised are: {known}") from None
    except OSError as error:
        raise ConfigError(f"{folder}: {client_id} cannot be revoked: {error.strerror}") from None


class AllowList:
    """The clients a server lets in: a file for each, read again when one is added, changed or removed."""

    def __init__(self, folder: Path) -> None:
        self._directory = folder / AUTHORIZED_DIR
        self._marks: Mapping[str, tuple[int, ...]] = {}
        self._keys: Mapping[str, str] = {}
        self._names: Mapping[str, str] = {}
        self.refresh()

    def refresh(self) -> bool:
        """Read the folder again if it has changed, and say whether it has; half a millisecond with 64 clients."""
        try:
            marks = self._look()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            return False  # nothing can be opened just now: clients that were let in stay so
        if marks == self._marks:
            return False
        keys: dict[str, str] = {}
        for name in sorted(marks):
            key = self._read(name)
            if key is not None and key not in keys.values():
                keys[name] = key
        # replaced, never changed: another thread may be reading
        self._marks, self._keys, self._names = marks, keys, {key: name for name, key in keys.items()}
        return True

    def client_of(self, public_key: str) -> str | None:
        """Return the name of the client with this key, None for a key that is not let in."""
        return self._names.get(public_key)

    def key_of(self, client_id: str) -> str | None:
        """Return a client's key, None for one that is not let in."""
        return self._keys.get(client_id)

    def keys(self) -> Mapping[str, str]:
        """Return all keys that are let in, by name."""
        return dict(self._keys)

    def _look(self) -> dict[str, tuple[int, ...]]:
        try:
            # closed by hand: a reader that Ctrl-C stops halfway leaves an open directory otherwise
            with os.scandir(self._directory) as entries:
                stats = {
                    entry.name.removesuffix(_SUFFIX): entry.stat() for entry in entries if entry.name.endswith(_SUFFIX)
                }
        except FileNotFoundError:
            return {}
        return {
            name: (found.st_mtime_ns, found.st_ino, found.st_size, found.st_ctime_ns) for name, found in stats.items()
        }

    def _read(self, name: str) -> str | None:
        path = self._directory / f"{name}{_SUFFIX}"
        if not re.fullmatch(NAME_PATTERN, name):
            log.warning("%s: not a client's name; nobody is let in by it", path)
            return None
        try:
            return _read_key(path)
        except ConfigError as error:
            log.warning("%s; nobody is let in by it", error)
            return None


def write_enrolment(path: Path, enrolment: Enrolment) -> None:
    """Write the file that a client needs to find the server and to know it."""
    tree = {
        "server": {"address": enrolment.server_address, "public_key": enrolment.server_public_key},
        "client": {"client_id": enrolment.client_id, "public_key": enrolment.client_public_key},
        "pinned": dict(enrolment.pinned),
    }
    try:
        path.write_text(tomlkit.dumps(tree), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def read_enrolment(path: Path) -> Enrolment:
    """Read and check an enrolment file; raise `ConfigError` naming what is wrong with it."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; it comes from the server's operator") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no enrolment file: {error}") from None
    match tree:
        case {
            "server": {"address": str(address), "public_key": str(server_key)},
            "client": {"client_id": str(client_id), "public_key": str(client_key)},
            **rest,
        }:
            pinned = rest.get("pinned", {})
        case _:
            raise ConfigError(f"{path}: no enrolment file: it needs [server] address, public_key and [client] ...")
    if not isinstance(pinned, dict):
        raise ConfigError(f"{path}: [pinned] is no table of names and keys")
    _check_name(client_id)
    for key in (server_key, client_key, *pinned.values()):
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ConfigError(f"{path}: a public key in it is not 40 characters of Z85: ask for the file anew")
    return Enrolment(
        server_address=address,
        server_public_key=server_key,
        client_id=client_id,
        client_public_key=client_key,
        pinned=pinned,
    )


def _write_new(path: Path, content: str, mode: int) -> None:
    """Write a file that must not exist, with its mode from the start: no moment at which others could read it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(content + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read_key(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; make a key pair with `splitfl keygen {path.parent}`") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path}: cannot be read as a key") from None
    if not _KEY.fullmatch(text):
        raise ConfigError(f"{path}: not a key of 40 characters of Z85")
    return text


def _check_private(path: Path, widest: int) -> None:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        folder = path if path.name != SECRET_FILE else path.parent
        raise ConfigError(f"{path}: no such file; make a key pair with `splitfl keygen {folder}`") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if mode & ~widest:
        raise ConfigError(
            f"{path} may be used by others (mode {mode:04o}): a secret key must be this user's alone; run"
            f" `chmod {widest:o} {path}`, and make new keys if somebody may have read it"
        )


def _check_name(client_id: str) -> None:
    if not re.fullmatch(NAME_PATTERN, client_id):
        raise ConfigError(f"client name {client_id[:70]!r}: write 1 to 64 letters, digits, '.', '_' or '-'")


def _check_system() -> None:
    if os.name == "nt":
        raise ConfigError(
            "keys cannot be used on Windows yet: splitfl cannot check there who else may read a secret key; use Linux,"
            " macOS, or Windows' Linux subsystem"
        )
