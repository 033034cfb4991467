"""One client's whole part in a run: what `splitfl client` does."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console

from client_edge.connection.connection import Connection
from client_edge.consent.gate import Gate, answers_for, folder_of
from client_edge.generating.generation import RemoteGenerator
from client_edge.layers.edge import Edge
from client_edge.link.files import Files
from client_edge.link.link import Link
from client_edge.link.received import fetch_description, fetch_layers, first_layers
from client_edge.loops import Loop, check_loop
from client_edge.measuring.answerer import Answerer
from client_edge.measuring.evaluator import Evaluator
from client_edge.part.evaluations import Evaluations
from client_edge.part.loop import Training
from client_edge.part.own_folder import METRICS_FILE, STATE_DIR, open_folder
from client_edge.part.own_log import OwnLog
from client_edge.part.participation import Participation
from client_edge.part.resuming import Resuming
from client_edge.part.totals import goodbye_before, totals_before
from client_edge.records.journal import Journal
from client_edge.screen import screen
from client_edge.text.batches import TrainBatches
from client_edge.text.own_text import Text, check_files, describe, read_text
from splitfl.config.sections import StorageSection
from splitfl.config.trees import ClientConfig, RunConfig
from splitfl.durability.store import Store
from splitfl.errors import DataError, NotAllowed, SplitflError, StorageError
from splitfl.models.cut import Cut
from splitfl.reporting.display import Display
from splitfl.session.client_session import ClientSession
from splitfl.stopping import Stopped, StopRequest
from splitfl.telemetry.history import History
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
    tell = _teller(console, config.client.client_id)
    gate = Gate(config.client, config.policy, answers_for(accept, tell))
    with _joined(config, gate, stop, tell) as connection:
        run = connection.run
        check_loop(run, connection.address, Loop.OF_ROUNDS)
        folder = folder_of(config.client, connection.welcome.run_id)
        tell(f"joined run {connection.welcome.run_id} at {connection.address}")
        open_folder(folder, run, resumes=resumes)
        with _prepared(config, connection, folder, device, console, begun_s=begun_s) as part:
            stop.raises = False  # from here on much can be half done
            try:
                part.run()
            except Stopped:
                tell(_where_it_goes_on(part.stopped(), connection.run, resumes=resumes))
                raise
            except NotAllowed:  # a bound of the policy is reached: as good as stopped
                part.save()
                raise
    tell(f"done; this client's own metrics are in {folder}")
    return folder


def _teller(console: Console, client_id: str) -> Callable[[str], None]:
    """Return how a client's sentences are shown."""
    return lambda text: console.print(f"{client_id}: {text}", markup=False, highlight=False)


@contextmanager
def _joined(config: ClientConfig, gate: Gate, stop: StopRequest, tell: Callable[[str], None]) -> Iterator[Connection]:
    """Join, and say why when we leave before the end."""
    connection = Connection(config.client, gate, stop, tell=tell)
    connection.on_lost = tell
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


@contextmanager
def _prepared(
    config: ClientConfig,
    connection: Connection,
    folder: Path,
    device: torch.device,
    console: Console,
    *,
    begun_s: float,
) -> Iterator[Participation]:
    """Fetch and read all that this client trains with, and go to where it was."""
    client, run, files, link = config.client, connection.run, Files(connection), Link(connection)
    tell = _teller(console, client.client_id)
    with ExitStack() as stack:
        store = stack.enter_context(_store_in(folder, run.storage))
        directory = fetch_description(files, client, folder)
        cut = fetch_layers(files, client, directory, device, tell=tell)
        connection.agree(lambda settings: ClientSession(terms_of(settings, cut)))
        text = read_text(config, run, directory)
        tell(describe(text, run))
        edge = _edge_of(cut, run, client.client_id, device, tell)

        history = stack.enter_context(History(folder, is_on=client.history, role="client", client_id=client.client_id))
        earlier, parted_after = totals_before(folder / METRICS_FILE), goodbye_before(folder / METRICS_FILE)
        metrics = stack.enter_context(MetricsLog(folder / METRICS_FILE))
        metrics.listen(stack.enter_context(Display(console)))
        own_log = OwnLog(metrics, client.client_id, edge, files, begun_s=begun_s)

        journal = Journal(store, edge, history, run.storage)
        for note in journal.recover():
            metrics.emit("note", text=note)
        own_log.started(device=client.device, resumed=not journal.is_new)

        evaluator = _evaluator_of(text, edge, link, max_rows=client.micro_batch_rows)
        training = Training(
            edge=edge,
            link=link,
            journal=journal,
            batches=TrainBatches.of(text.train, run, client),
            evaluations=Evaluations(evaluator, text, link, journal, own_log),
            own_log=own_log,
        )
        resuming = Resuming(training, first_layers=lambda: first_layers(files, client, cut))
        yield Participation(training, resuming, earlier=earlier, parted_after=parted_after)


def _store_in(folder: Path, storage: StorageSection) -> Store:
    return Store(
        folder / STATE_DIR,
        fsync=storage.fsync,
        fsync_interval=storage.fsync_interval,
        keep=storage.keep_snapshots,
    )


def _edge_of(cut: Cut, run: RunConfig, client_id: str, device: torch.device, tell: Callable[[str], None]) -> Edge:
    edge = Edge(cut, run, client_id, device)
    if edge.takes_plain_loss and run.train.loss == "chunked":
        family = cut.whole.config.model_type
        tell(f"{family} does more to its logits than the chunked loss knows: the plain loss is taken")
    return edge


def _evaluator_of(text: Text, edge: Edge, link: Link, *, max_rows: int) -> Evaluator:
    answerer = None
    if text.exam.to_answer:
        answerer = Answerer(edge.model(RemoteGenerator(link.connection)), text.tokenizer)
    return Evaluator(edge, link, text.exam, answerer, max_rows=max_rows)


def _where_it_goes_on(step: int, run: RunConfig, *, resumes: bool) -> str:
    """Say what becomes of a client that is stopped."""
    how = "the same command again" if resumes else "the same command again, without `--resume never`,"
    timeout_s = run.federation.step_timeout
    return (
        f"stopped; start {how} to resume at step {step}. Its place in the round is kept for {timeout_s:g} s"
        " (federation.step_timeout); after that the others go on, and it takes part again from where they are"
    )
