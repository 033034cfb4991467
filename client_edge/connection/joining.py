"""Joining a server's run: connect, say Hello, and take a welcome that may be believed."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from client_edge.connection.endings import NoAnswer
from client_edge.connection.heard import heard
from client_edge.connection.welcome import check_welcome, settings_of
from client_edge.consent.gate import Gate
from splitfl import __version__
from splitfl.config.operation import LinkSection
from splitfl.config.own import ClientSection
from splitfl.config.run import differences
from splitfl.config.trees import RunConfig
from splitfl.errors import ConfigError, PeerGone, Refused, RemoteProtocolError, SplitflError
from splitfl.protocol import codec
from splitfl.protocol.messages import WIRE_VERSION, Hello, Refusal, Welcome
from splitfl.stopping import StopRequest
from splitfl.transport.keys import read_enrolment, read_key_pair
from splitfl.transport.reach import NOBODY_THERE
from splitfl.transport.security import ClientSecurity
from splitfl.transport.zeromq import ConnectionLost, Endpoint, HandshakeFailed, Traffic

log = logging.getLogger(__name__)

# A server that lives answers a Hello at once; a new connection is tried after this.
JOIN_AGAIN_S = 10.0
# How long a wait lasts at most before it looks whether a stop was asked for.
_POLL_S = 0.2
# Longer than this only a person takes to accept what a welcome says.
_READING_S = 1.0
# When a client says for the first time what it is trying, how often it says so, and when a check takes silence for
# nobody.
_TRYING_AFTER_S = 1.0
_TRYING_EVERY_S = 10.0
_HOPELESS_AFTER_S = 3.0
_RETRY_LEAST_S = 0.1
_MAX_HANDSHAKES = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Joined:
    """A data connection on which the server has said welcome."""

    endpoint: Endpoint
    welcome: Welcome
    run: RunConfig
    num_bytes: int
    """Bytes of the welcome."""

    def check_same(self, before: "Joined", address: str) -> None:
        """Raise `Refused` unless it is the run that was joined before, and what this client has agreed to.

        How the run is operated may have changed.
        """
        then, now = before.welcome.run_id, self.welcome.run_id
        if now != then:
            raise Refused(
                f"{address} now serves run {now} and no longer {then}: start the client again to take part in that"
            )
        other = [
            f"{name} (was {was!r}, is {value!r})"
            for old, new in (
                (before.run.identity(), self.run.identity()),
                (before.run.exposure(), self.run.exposure()),
            )
            for name, was, value in differences(old, new)
        ]
        if other:
            raise Refused(
                f"{address} now serves run {now} with other settings than this client has agreed to:"
                f" {'; '.join(dict.fromkeys(other))}. Start the client again to take part in that"
            )


class Joining:
    """Makes the connections of one client, and joins with each."""

    def __init__(
        self, client: ClientSection, gate: Gate, stop: StopRequest, *, tell: Callable[[str], None], is_patient: bool
    ) -> None:
        """`tell` gets a sentence while nobody answers; without patience that nobody listens is the end of it."""
        self._client, self._gate, self._stop = client, gate, stop
        self._tell, self._is_patient = tell, is_patient
        self._security = _security_of(client)
        self.address = client.server_address
        if client.enrolment is not None:
            self.address = read_enrolment(client.enrolment).server_address
        self._bounds = LinkSection()
        self._say_trying_s = time.monotonic() + _TRYING_AFTER_S
        self.traffic: list[Traffic] = []
        """What went over each connection that was made, those for heartbeats included."""

    @property
    def server_key(self) -> str:
        """The public key that the server has to have, "" without keys."""
        return self._security.server_public_key if self._security is not None else ""

    def connect(self, bounds: LinkSection) -> Endpoint:
        """Make one more connection to the server."""
        endpoint = Endpoint(
            self.address,
            max_frame_bytes=bounds.frame_bytes,
            heartbeat_interval=bounds.heartbeat_interval,
            heartbeat_timeout=bounds.heartbeat_timeout,
            security=self._security,
            socks_proxy=self._client.socks_proxy,
        )
        self.traffic.append(endpoint.traffic)
        return endpoint

    def first(self) -> Joined:
        """Join for the first time; raise `Refused`, or `PeerGone` when nobody answers in time."""
        joined = self._first_welcome()
        begun_s = time.monotonic()
        self._admit(joined)
        if time.monotonic() - begun_s <= _READING_S:
            return joined
        joined.endpoint.close()  # a server takes such a silence for the end
        try:
            return self.again(joined)
        except PeerGone as gone:
            raise PeerGone(
                f"{self.address} has gone while its settings were read ({gone}); that they were accepted is kept: start"
                " the same command when the server is back"
            ) from None

    def again(self, before: Joined) -> Joined:
        """Try once to join the same run; raise `PeerGone` or `Refused`."""
        joined = self._join_as_wanted(JOIN_AGAIN_S)
        try:
            joined.check_same(before, self.address)
        except Refused:
            joined.endpoint.close()
            raise
        self._admit(joined)
        return joined

    def _admit(self, joined: Joined) -> None:
        try:
            self._gate.admit(joined.welcome, joined.run, address=self.address, server_key=self.server_key)
        except BaseException:
            joined.endpoint.close()
            raise

    def _first_welcome(self) -> Joined:
        """Join; a connection that breaks while it is made, or is silent, is made again."""
        timeout_s = self._client.connect_timeout
        deadline_s = time.monotonic() + timeout_s
        failed_handshakes, reason = 0, ""
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                return self._join_as_wanted(min(left_s, JOIN_AGAIN_S))
            except HandshakeFailed:
                failed_handshakes += 1
                if failed_handshakes >= _MAX_HANDSHAKES:
                    raise
            except (ConnectionLost, NoAnswer) as gone:
                log.info("joining again: %s", gone)
                reason = str(gone)
                self._say_trying(reason)
                if not self._is_patient and isinstance(gone, ConnectionLost):
                    break
            self._stop.sleep(_RETRY_LEAST_S)
        tried = f" after {timeout_s:g} s of trying to connect" if self._is_patient else ""
        raise PeerGone(
            f"no answer from {self.address}{tried} ({reason}): is the server running, and is this its address?"
        )

    def _join_as_wanted(self, timeout_s: float) -> Joined:
        """Connect and join, and once more where the run wants connections of another kind."""
        for _ in range(2):
            joined = self._join(self.connect(self._bounds), timeout_s)
            fits, self._bounds = fits_bounds(self._bounds, joined.run.link), joined.run.link
            if fits:
                return joined
            joined.endpoint.close()
        raise NoAnswer(f"{self.address} says something else of its link with every answer")

    def _join(self, endpoint: Endpoint, timeout_s: float) -> Joined:
        name = self._client.client_id
        endpoint.send(codec.encode(Hello(wire_version=WIRE_VERSION, software=f"splitfl {__version__}", client_id=name)))
        try:
            frames = self._first_answer(endpoint, timeout_s)
            match heard(frames, max_frame_bytes=self._bounds.frame_bytes):
                case Welcome() as welcome:
                    check_welcome(welcome)
                    run = settings_of(welcome)
                    self._gate.check(welcome, run)  # before its bounds become ours
                    return Joined(endpoint=endpoint, welcome=welcome, run=run, num_bytes=codec.payload(frames))
                case Refusal(code=code, reason=reason):
                    raise Refused(f"{self.address} refused {name}: {reason} ({code})", code=code)
                case other:
                    raise RemoteProtocolError(f"{type(other).__name__} in answer to Hello")
        except SplitflError:
            endpoint.close()
            raise

    def _first_answer(self, endpoint: Endpoint, timeout_s: float) -> list[memoryview]:
        begun_s = time.monotonic()
        while (left_s := begun_s + timeout_s - time.monotonic()) > 0:
            self._stop.check()
            frames = endpoint.recv(min(left_s, _POLL_S if self._is_patient else _POLL_S / 4))
            if frames is not None:
                self._say_trying_s = math.inf
                return frames
            self._say_trying(endpoint.finding())
            if not self._is_patient and _is_hopeless(endpoint, time.monotonic() - begun_s):
                raise ConnectionLost(endpoint.finding())
        raise NoAnswer(f"{endpoint.finding()}, for {timeout_s:.3g} s")

    def _say_trying(self, found: str) -> None:
        """Say what is tried when the first answer takes long, and what is known of it."""
        if time.monotonic() < self._say_trying_s:
            return
        self._say_trying_s = time.monotonic() + _TRYING_EVERY_S
        what = f"nobody listens at {self.address} yet" if found == NOBODY_THERE else f"{self.address}: {found}"
        self._tell(f"{what}; trying for up to {self._client.connect_timeout:g} s")


def fits_bounds(bounds: LinkSection, wanted: LinkSection) -> bool:
    """Tell whether connections that were made with some bounds are as a run wants them."""
    same_heart = ("heartbeat_interval", "heartbeat_timeout")
    has_same_heart = all(getattr(bounds, name) == getattr(wanted, name) for name in same_heart)
    return has_same_heart and wanted.frame_bytes <= bounds.frame_bytes


def _is_hopeless(endpoint: Endpoint, waited_s: float) -> bool:
    return endpoint.is_refused or (not endpoint.is_reached and waited_s > _HOPELESS_AFTER_S)


def _security_of(client: ClientSection) -> ClientSecurity | None:
    """Return the keys that the settings name; a key pair and an enrolment file only mean something together."""
    if client.keys is None and client.enrolment is None:
        return None
    if client.keys is None or client.enrolment is None:
        missing = "client.keys" if client.keys is None else "client.enrolment"
        raise ConfigError(
            f"{missing} is not set: encryption needs both, the folder that `splitfl keygen` made here, and the"
            " enrolment file that the server's operator sent back"
        )
    pair, enrolment = read_key_pair(client.keys), read_enrolment(client.enrolment)
    if enrolment.client_id != client.client_id:
        raise ConfigError(
            f"client.client_id is {client.client_id}, but {client.enrolment} enrols {enrolment.client_id}: set it so"
        )
    if enrolment.client_public_key != pair.public:
        raise ConfigError(
            f"{client.enrolment} was made for another key than the one in {client.keys}: send the operator"
            " this folder's public.key, and use the enrolment file that comes back"
        )
    return ClientSecurity(key_pair=pair, server_public_key=enrolment.server_public_key)
