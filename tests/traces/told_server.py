"""The server of a conversation: the real one, with a wire in memory and a clock that only the script moves."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from traces.sentences import event_sentence, sentence

from server_backbone.compute.queue import Done
from server_backbone.desks.desk import Effect, Effects
from server_backbone.engine import work
from server_backbone.engine.work import Work
from server_backbone.host import build_server, load
from server_backbone.server import Server
from splitfl.config.trees import ServerConfig
from splitfl.durability.store import Store
from splitfl.errors import PeerGone
from splitfl.protocol import codec
from splitfl.protocol.messages import Buffer, Message, Resume
from splitfl.session.server_session import ServerSession
from splitfl.stopping import StopRequest
from splitfl.telemetry.history import History
from splitfl.telemetry.metrics import Event, MetricsLog
from splitfl.transport.zeromq import Arrived, Listener

# The compute thread has this long for what a line of a script asks of it.
_PATIENCE_S = 30.0
_NOWHERE = "nobody"


class Wire:
    """A listener without a socket: it hands every message that is sent to the script."""

    def __init__(self, deliver: Callable[[str, Message], bool]) -> None:
        """`deliver` takes a client's name and a message, and returns whether there is a connection."""
        self._deliver = deliver
        self.connections: dict[str, int] = {}
        """Number of each client's connection that is whole."""
        self.has_news = threading.Event()

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> int:
        """Send, or find the peer gone."""
        name, number, _ = peer.decode().split("/")
        sent = codec.decode([memoryview(bytes(frame)) for frame in frames], max_frame_bytes=1 << 20)
        if self.connections.get(name) != int(number) or not self._deliver(name, sent):
            raise PeerGone("the peer has closed its connection")
        return sum(map(len, frames))

    def wake(self) -> None:
        """Note that the compute thread has finished something."""
        self.has_news.set()

    def sweep(self) -> Iterable[Any]:
        """Nothing is cut off here."""
        return ()

    def bound_messages(self, **bounds: int) -> None:
        """Take any message."""


@dataclass(kw_only=True)
class ToldServer(Server):
    """The server, which tells what follows from what, and whose loop is the script."""

    tell: Callable[[str], None]
    wire: Wire
    store: Store

    def take(self, peer: bytes, message: Message) -> None:
        """Take a message as if it had just arrived."""
        frames = [memoryview(bytes(frame)) for frame in codec.encode(message)]
        now_s = self.clock()
        self._take_in(self._mail.open(Arrived(peer=peer, user_id="", frames=frames), now_s), now_s)

    def settle(self) -> None:
        """Have the compute thread do all that it was given, and go on with the results."""
        while self.hear_results():
            pass

    def hear_results(self) -> int:
        """Go on with the results of all that the compute thread was given so far; return how many there were."""
        self._num_done, self._is_settled = 0, False
        self._queue.put(work.Settle(token=_NOWHERE, claim=_NO_CLAIM))
        while not self._is_settled:
            self.wire.has_news.clear()
            if not self._hand_over():
                assert self.wire.has_news.wait(_PATIENCE_S), "the compute thread hangs"
        self._meet_gone(self.clock())
        return self._num_done

    def _hand_over(self) -> bool:
        """Hand over results, but none of work that was put after `_NOWHERE`'s; return whether there was one."""
        for done in self._queue.done():
            self._carry_out(self._follow_up(done, self.clock()), self.clock())
            return True
        return False

    def tick(self) -> None:
        """Look at the deadlines."""
        self._tick(self.clock())

    def loses(self, client_id: str) -> None:
        """Find a client's connection closed, as when something was to be sent on it."""
        connection = self._members[client_id].connection
        if connection is not None:
            self._carry_out(self._desks.presence.lose(connection, "the peer has closed its connection"), self.clock())

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, so that the server would stop."""
        return self._desks.endings.is_over

    def close(self) -> None:
        """End as a killed process does: nothing is said, and all that is written stays."""
        self._queue.close()
        self.store.close()
        self.metrics.close()

    def session_of(self, client_id: str) -> ServerSession | None:
        """Return the server's side of a client's session, None for one that it has not let in."""
        member = self._members.get(client_id)
        return None if member is None else member.session

    def waits_for(self) -> str:
        """Say what the run waits for."""
        return self._desks.waiting.waiting_for() or "nothing"

    def _follow(self, effect: Effect, now_s: float) -> Effects:
        self.tell(f"  do: {sentence(effect)}")
        return super()._follow(effect, now_s)

    def _follow_up(self, done: Done[Work], now_s: float) -> Effects:
        if isinstance(done.work, work.Settle) and done.work.token == _NOWHERE:
            self._is_settled = True
        else:
            self._num_done += 1
        return super()._follow_up(done, now_s)


_NO_CLAIM = Resume(held_round=0, step=0, commit_number=0, pending_step=0)


def told_server(
    config: ServerConfig, run_dir: Path, wire: Wire, clock: Callable[[], float], tell: Callable[[str], None]
) -> ToldServer:
    """Build a run's server as `splitfl server` does, or go on with the run that lies in the folder."""
    resumes = run_dir.exists()
    run_dir.mkdir(exist_ok=True)
    device = torch.device("cpu")
    store = Store(run_dir / "state", fsync="never", fsync_interval=1.0, keep=config.storage.keep_snapshots)
    metrics = MetricsLog(run_dir / "metrics.jsonl", clock=clock)
    listener, history = cast(Listener, wire), History(run_dir, is_on=False, role="server")
    built = build_server(
        config, load(config, device), listener, None, store, metrics, history, run_dir, device, StopRequest()
    )
    parts = {each.name: getattr(built, each.name) for each in fields(Server)}
    server = ToldServer(**{**parts, "clock": clock}, tell=tell, wire=wire, store=store)
    metrics.listen(_Teller(tell))
    _begin(server, config, resumes=resumes)
    return server


def _begin(server: ToldServer, config: ServerConfig, *, resumes: bool) -> None:
    ledger = server.engine.ledger
    if not resumes:
        ledger.begin(config.run_config().fingerprint())
        return
    ledger.recover(lambda _number, _client: None)
    server.engine.restore()
    server.recover()


class _Teller:
    """Tells events, and of those that say what is waited for the ones that are new."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._waits_for = ""

    def __call__(self, event: Event) -> None:
        if event["event"] == "waiting":
            if event["text"] == self._waits_for:
                return
            self._waits_for = event["text"]
        self._tell(f"  say: {event_sentence(event)}")
