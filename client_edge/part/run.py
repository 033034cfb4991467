"""One client's whole part in a run: what `splitfl client` does."""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from client_edge.connection.connection import Connection
from client_edge.connection.endings import ServerStops
from client_edge.consent.gate import Gate, answers_for, folder_of
from client_edge.generating.generation import FarGenerator
from client_edge.layers.edge import Edge
from client_edge.link.files import Files
from client_edge.link.link import Link
from client_edge.link.received import fetch_description, fetch_layers, first_layers
from client_edge.loops import Loop, check_loop
from client_edge.part.evaluation import Answerer, Evaluator
from client_edge.part.journal import Journal
from client_edge.part.loop import Step, report_layers, train
from client_edge.part.run_folder import RUN_FILE, STATE_DIR, check_run, write_run
from client_edge.part.totals import Totals, goodbye_before, totals_before
from client_edge.screen import screen
from client_edge.text.batches import TrainBatches
from client_edge.text.own_text import Text, check_files, describe, read_text
from splitfl.config.run import differences
from splitfl.config.trees import ClientConfig, RunConfig
from splitfl.durability.disk import make_private_dir
from splitfl.durability.store import Store
from splitfl.errors import (
    DataError,
    NotAllowed,
    PeerGone,
    Refused,
    RemoteProtocolError,
    SplitflError,
    StorageError,
)
from splitfl.protocol.messages import Merged, Resumed, RoundOpened, RoundsEnded, Why
from splitfl.reporting.display import Display
from splitfl.session.client_session import ClientSession
from splitfl.stopping import Stopped, StopRequest
from splitfl.telemetry.history import History
from splitfl.telemetry.measures import ALSO, event_of
from splitfl.telemetry.memory import peak_rss_bytes
from splitfl.telemetry.metrics import MetricsLog
from splitfl.training.device import open_device
from splitfl.training.terms import terms_of


def take_part(
    config: ClientConfig, *, resumes: bool = True, accept: bool | str = False, stop: StopRequest | None = None
) -> Path:
    """Join a run, or go on with it, train in it to its end, and return the folder with this client's own metrics.

    What the run's settings let the server see has to be accepted once: by `accept` (True, or in words how it was), or
    on the terminal. Raises `NotAccepted` otherwise, and `NotAllowed` for what `[policy]` does not allow.
    When a `stop` is asked for everything is saved, the server told, and `Stopped` raised.
    """
    begun_s, stop = time.monotonic(), stop or StopRequest()
    check_files(config)
    if config.client.num_threads:
        torch.set_num_threads(config.client.num_threads)
    device = open_device(config.client.device, "client.device")
    console = screen()
    with ExitStack() as stack:

        def tell(text: str) -> None:
            _say(console, config, text)

        gate = Gate(config.client, config.policy, answers_for(accept, tell))
        connection = stack.enter_context(_joined(config, gate, stop, tell=tell))
        connection.on_lost = lambda text: _say(console, config, text)
        run = connection.run
        check_loop(run, connection.address, Loop.OF_ROUNDS)
        folder = folder_of(config.client, connection.welcome.run_id)
        _say(console, config, f"joined run {connection.welcome.run_id} at {connection.address}")
        make_private_dir(folder)
        storage = run.storage
        if not resumes:
            _forget(folder)
        check_run(folder, run)
        write_run(folder, run)
        store = stack.enter_context(
            Store(
                folder / STATE_DIR,
                fsync=storage.fsync,
                fsync_interval=storage.fsync_interval,
                keep=storage.keep_snapshots,
            )
        )
        files = Files(connection)
        directory = fetch_description(files, config.client, folder)
        cut = fetch_layers(files, config.client, directory, device, tell=lambda text: _say(console, config, text))
        connection.agree(lambda settings: ClientSession(terms_of(settings, cut)))
        link = Link(connection)
        text = read_text(config, run, directory)
        _say(console, config, describe(text, run))
        edge = Edge(cut, run, config.client.client_id, device)
        if edge.takes_plain_loss and run.train.loss == "chunked":
            family = cut.whole.config.model_type
            _say(
                console,
                config,
                f"{family} does more to its logits than the chunked loss knows: the plain loss is taken",
            )
        history = stack.enter_context(
            History(folder, is_on=config.client.history, role="client", client_id=config.client.client_id)
        )
        earlier = totals_before(folder / "metrics.jsonl")
        metrics = stack.enter_context(MetricsLog(folder / "metrics.jsonl"))
        display = stack.enter_context(Display(console))
        metrics.listen(display)
        journal = Journal(
            store, edge, history, keeps_records=storage.durability == "redo", snapshot_steps=storage.snapshot_steps
        )
        for note in journal.recover():
            metrics.emit("note", text=note)
        answerer, max_rows = None, config.client.micro_batch_rows
        if text.exam.to_answer:
            answerer = Answerer(edge.model(FarGenerator(connection)), text.tokenizer, run, max_rows=max_rows)
        evaluator = Evaluator(run, edge, link, text.exam, answerer, max_rows=max_rows)
        part = Participation(
            config,
            link,
            files,
            edge,
            journal,
            text,
            evaluator,
            metrics,
            begun_s,
            earlier=earlier,
            first_layers=lambda: first_layers(files, config.client, cut),
        )
        stop.raises = False  # from here on much can be half done
        try:
            part.run()
        except Stopped:
            journal.stopped()
            part.stopped()
            _say(console, config, _where_it_goes_on(journal.place.step + 1, connection.run, resumes=resumes))
            raise
        except NotAllowed:  # a bound of the policy is reached: as good as stopped
            journal.stopped()
            raise
    _say(console, config, f"done; this client's own metrics are in {folder}")
    return folder


class _GoesOn(Exception):  # noqa: N818  # no error: the run was prolonged while its end was under way
    """There are further rounds."""


class Participation:
    """Evaluate, train, evaluate, hand over the totals; and tell this client's own log how it goes.

    Each part may lose the connection at any point: `_persist` makes a new one, settles where client and server are, and
    does the part again from there.
    """

    def __init__(
        self,
        config: ClientConfig,
        link: Link,
        files: Files,
        edge: Edge,
        journal: Journal,
        text: Text,
        evaluator: Evaluator,
        metrics: MetricsLog,
        begun_s: float,
        *,
        earlier: Totals,
        first_layers: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """`earlier` is what processes before this one have taken, `first_layers` what trains here before any step."""
        self._earlier = earlier
        self._first_layers = first_layers
        self._client_id = config.client.client_id
        self._device = config.client.device
        self._link = link
        self._connection = link.connection
        self._files = files
        self._edge = edge
        self._journal = journal
        self._text = text
        self._evaluator = evaluator
        self._metrics = metrics
        self._begun_s = begun_s
        self._federation = self._connection.run.federation
        self._round_number = 0
        parted_after = goodbye_before(metrics.path)
        self._has_said_goodbye = parted_after == journal.place.held_round >= self._federation.num_rounds
        self._batches = TrainBatches.of(text.train, self._connection.run, config.client)

    def run(self) -> None:
        """Do it all."""
        self._metrics.emit(
            "run_started",
            run_id=self._connection.welcome.run_id,
            model=self._connection.run.model.model_name_or_path,
            server_mode=self._federation.server_mode,
            num_rounds=self._federation.num_rounds,
            local_steps=self._federation.local_steps,
            fingerprint=self._connection.welcome.fingerprint,
            device=self._device,
            resumed=not self._journal.is_new,
        )
        self._connection.on_waiting = lambda text: self._emit("waiting", text=text)
        self._connection.on_settings = self._adopt
        try:
            self._persist(self._resume, settles=False)
        except (PeerGone, Refused) as gone:
            if not self._was_done_before(gone):
                raise
            self._emit("note", text=f"the run was over before this client came back to it: {gone}")
            self._journal.finished()
            return
        while True:
            self._persist(self._train)
            try:
                self._part()
                break
            except _GoesOn:
                self._emit("note", text="the run has more rounds than it had: training goes on")
        self._journal.finished()

    def _part(self) -> None:
        """Evaluate once more and hand over the totals; all that counts is merged, so the server may have ended."""
        try:
            self._persist(lambda: self._evaluate("after"), is_last=True)
            self._persist(self._say_goodbye, is_last=True)
        except (PeerGone, Refused) as gone:
            if not self._may_end_without(gone):
                raise
            self._emit("note", text=f"the run was over before the server took leave of this client: {gone}")

    def _may_end_without(self, gone: PeerGone | Refused) -> bool:
        """Tell whether nothing is lost with this answer: the run has gone through, or our goodbye went unanswered."""
        code = gone.code if isinstance(gone, Refused) else ""  # none where nobody, or another run, answers there
        return code == Why.FINISHED if code else self._has_said_goodbye

    def _was_done_before(self, gone: PeerGone | Refused) -> bool:
        """Tell whether the run is over for a client that was away, and that had done everything."""
        return self._journal.place.held_round >= self._federation.num_rounds and self._may_end_without(gone)

    def _train(self) -> None:
        self._has_said_goodbye = False
        num_examples = len(self._text.train)
        train(self._edge, self._link, self._journal, self._batches, num_examples=num_examples, observer=self)

    def _adopt(self, before: RunConfig, run: RunConfig) -> None:
        """Go on with the settings of a server that has come back with others."""
        self._federation = run.federation
        self._journal.adopt(run.storage)
        self._evaluator.adopt(run)
        changes = [
            {"name": name, "before": then, "now": now}
            for name, then, now in differences(before.operation(), run.operation())
        ]
        self._emit("settings_changed", changes=changes)

    def _persist(self, part: Callable[[], None], *, settles: bool = True, is_last: bool = False) -> None:
        """Do a part of the run, over as many connections as it takes.

        Raises `_GoesOn` in front of a part that is the run's last, if a server that has come back has more rounds.
        """
        is_lost = False
        while True:
            try:
                if is_lost and settles:
                    self._resume()
                    if is_last and not self._link.session.is_parting:
                        raise _GoesOn
                part()
                return
            except PeerGone as gone:
                is_lost = True
                if isinstance(gone, ServerStops):
                    self._journal.stopped()
                self._drop_unfinished()
                patience_s = 2 * self._connection.run.link.heartbeat_timeout if self._has_said_goodbye else None
                self._connection.reconnect(gone, resume_at=self._journal.place.step + 1, within_s=patience_s)

    def _drop_unfinished(self) -> None:
        """Drop what was under way when the connection was lost; a step that was asked for keeps its gradients."""
        if self._journal.pending is None:
            self._edge.discard()

    def _resume(self) -> None:
        """Find out where this client and the server are, and bring this client there."""
        counted = False
        resumed = self._ask_where()
        if resumed.verdict == "rewind":
            self._emit("rewound", step=resumed.step, reason=resumed.reason)
            if not self._journal.rewind(resumed.step, resumed.commit_number, resumed.held_round):
                self._edge.begin_again(self._first_layers())
                self._journal.begin_at(0, 0, "its records do not reach back that far", forgets=True)
            self._connection.agree_again()
            resumed = self._ask_where()
        if resumed.verdict == "rewind":
            raise RemoteProtocolError("the server wants this client to go back, and to go back again")
        if resumed.verdict == "anew":
            self._emit("rejoined", reason=f"{resumed.reason}: it takes part again from the next round on")
            self._edge.discard()
            if not resumed.layers:  # nothing is merged, and all begin with the first ones
                self._edge.begin_again(self._first_layers())
            self._journal.begin_at(resumed.step, resumed.commit_number, resumed.reason)
        else:
            self._settle(resumed)
            counted = resumed.counted_round > self._journal.place.held_round
        if resumed.layers:
            self._journal.loaded(self._link.realise(resumed.layers), resumed.held_round, counted=counted)
            digest = report_layers(self._edge, self._link, resumed.held_round)
            self._emit("loaded", round=resumed.held_round, accepted=True, reason="", digest=digest)
        self._round_number = resumed.round_number or self._round_number
        if self._federation.compares_rounds and not resumed.round_number:
            self._journal.evaluates_again()

    def _ask_where(self) -> Resumed:
        place, pending = self._journal.place, self._journal.pending
        return self._connection.resume(
            held_round=place.held_round,
            step=place.step,
            commit_number=place.commit_number,
            pending_step=pending.step if pending else 0,
        )

    def _settle(self, resumed: Resumed) -> None:
        """Apply the step that was asked for if the server has, else forget it."""
        pending = self._journal.pending
        if pending is None or resumed.step != pending.step:
            self._journal.refused()
            return
        self._journal.acknowledged(commit_number=resumed.commit_number, clip_coefficient=resumed.clip_coefficient)
        self.stepped(Step.of(pending.step, pending.loss, self._batches.at(pending.step)))

    def between_rounds(self) -> None:
        """Evaluate the layers held, once, where that is to be done."""
        place = self._journal.place
        if place.evaluated < 0:
            self._evaluate("before")
        elif place.evaluated < place.held_round and self._federation.evaluate == "rounds":
            self._evaluate("round")
        else:
            return
        self._journal.evaluated()

    def round_opened(self, round_: RoundOpened) -> None:
        """Log the round; `trainers` is empty when we sit it out."""
        self._round_number = round_.round_number
        self._emit(
            "round_opened",
            round=round_.round_number,
            trainers=[self._client_id] if round_.num_steps else [],
            first_step=round_.first_step,
            num_steps=round_.num_steps,
        )

    def rounds_ended(self, ended: RoundsEnded) -> None:
        """Log why, and which round's layers these are."""
        self._emit("rounds_ended", reason=ended.reason, best_round=ended.best_round)

    def stepped(self, step: Step) -> None:
        """Log the step."""
        self._emit(
            "step",
            round=self._round_number,
            step=step.step,
            loss=step.loss,
            num_label_tokens=step.num_label_tokens,
            num_tokens=step.num_tokens,
            num_positions=step.num_positions,
            compute_seconds=self._edge.compute.seconds,
            bytes_sent=self._connection.bytes_sent,
            bytes_received=self._connection.bytes_received,
        )

    def merged(self, merged: Merged, digest: str) -> None:
        """Log the merge."""
        self._emit("loaded", round=merged.round_number, accepted=merged.accepted, reason=merged.reason, digest=digest)

    def _evaluate(self, phase: str) -> None:
        if self._text.held_out is None:
            return
        measured = self._evaluator.measure(self._text.held_out)
        also = {
            name: self._evaluator.loss(dataset)
            for name, dataset in (self._text.also.items() if phase == "after" else ())
        }
        round_number = self._journal.place.held_round
        beside = {ALSO + name: loss for name, loss in also.items() if math.isfinite(loss)}
        self._link.report("evaluated", phase=phase, round_number=round_number, metrics=measured | beside)
        self._emit("evaluated", phase=phase, round=round_number, **event_of(measured), also=also)

    def _say_goodbye(self) -> None:
        totals = {
            "num_examples": len(self._text.train),
            "num_truncated": self._text.train.num_truncated,
            **self._earlier.and_then(self._totals()).as_fields(),
        }
        self._has_said_goodbye = True
        self._emit("says_goodbye", round=self._journal.place.held_round)
        self._link.goodbye({name: float(value) for name, value in totals.items()})
        self._emit("client_done", **totals)

    def stopped(self) -> None:
        """Write what this process has taken, for the one that goes on."""
        self._emit("client_stopped", step=self._journal.place.step, **self._totals().as_fields())

    def _totals(self) -> Totals:
        return Totals(
            bytes_sent=self._connection.bytes_sent,
            bytes_received=self._connection.bytes_received,
            bytes_of_files=self._files.bytes_fetched,
            peak_rss_bytes=peak_rss_bytes(),
            wall_seconds=time.monotonic() - self._begun_s,
            compute_seconds=self._edge.compute.seconds,
        )

    def _emit(self, event: str, **fields: Any) -> None:
        self._metrics.emit(event, client_id=self._client_id, **fields)


def _where_it_goes_on(step: int, run: RunConfig, *, resumes: bool) -> str:
    """Say what becomes of a client that is stopped."""
    how = "the same command again" if resumes else "the same command again, without `--resume never`,"
    timeout_s = run.federation.step_timeout
    return (
        f"stopped; start {how} to resume at step {step}. Its place in the round is kept for {timeout_s:g} s"
        " (federation.step_timeout); after that the others go on, and it takes part again from where they are"
    )


@contextmanager
def _joined(config: ClientConfig, gate: Gate, stop: StopRequest, tell: Callable[[str], None]) -> Iterator[Connection]:
    """Join, and say why when we leave before the end."""
    connection = Connection(config.client, gate, stop, tell=tell)
    connection.leaving, connection.comes_back = "stopped without a reason", True  # as if it were killed
    try:
        yield connection
        connection.leaving = ""
    except KeyboardInterrupt:
        connection.leaving = "stopped by its operator"
        raise
    except StorageError as error:  # which says to start it again
        connection.leaving = type(error).__name__
        raise
    except DataError:
        # the reason names files, which are nobody else's affair
        connection.leaving, connection.comes_back = "could not read its data", False
        raise
    except SplitflError as error:
        connection.leaving, connection.comes_back = type(error).__name__, False
        raise
    finally:
        connection.close()


def _forget(folder: Path) -> None:
    """Begin anew: remove what an earlier start of this client has left."""
    shutil.rmtree(folder / STATE_DIR, ignore_errors=True)
    (folder / RUN_FILE).unlink(missing_ok=True)


def _say(console: Console, config: ClientConfig, text: str) -> None:
    console.print(f"{config.client.client_id}: {text}", markup=False, highlight=False)
