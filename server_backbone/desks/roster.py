"""Every desk of a run: built once, in the order in which they are asked."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TypedDict

from server_backbone.compute.queue import Queue
from server_backbone.deciding.caches import CacheBook
from server_backbone.desks.attendance.arrivals import Arrivals
from server_backbone.desks.attendance.presence import Presence
from server_backbone.desks.attendance.waiting import Waiting
from server_backbone.desks.desk import Desk, Effects
from server_backbone.desks.services.files import Files
from server_backbone.desks.services.generations import Generations
from server_backbone.desks.services.snapshots import Snapshots
from server_backbone.desks.training.endings import Endings
from server_backbone.desks.training.excuses import Excuses
from server_backbone.desks.training.layers import CommonLayers
from server_backbone.desks.training.measurements import Sayer
from server_backbone.desks.training.merges import Merges
from server_backbone.desks.training.openings import Openings
from server_backbone.desks.training.reports import Reports
from server_backbone.desks.training.steps import Steps
from server_backbone.door.admission import Admission
from server_backbone.door.mail import Mail
from server_backbone.door.members import Members
from server_backbone.engine.engine import Engine
from server_backbone.engine.work import Work
from server_backbone.kinds import ServerParts
from server_backbone.provisions import Provisions
from splitfl.config.trees import RunConfig
from splitfl.protocol.messages import Welcome
from splitfl.protocol.tensors import Tensors
from splitfl.session.limits import Limits
from splitfl.session.terms import Terms
from splitfl.telemetry.history import History
from splitfl.telemetry.metrics import MetricsLog
from splitfl.training.backbones import backbone_of


@dataclass(frozen=True, kw_only=True)
class Roster:
    """The desks, by name; iterating gives them in the order in which they hear of deadlines and losses."""

    presence: Presence
    arrivals: Arrivals
    generations: Generations
    waiting: Waiting
    excuses: Excuses
    steps: Steps
    openings: Openings
    merges: Merges
    endings: Endings
    reports: Reports
    snapshots: Snapshots
    files: Files

    def __iter__(self) -> Iterator[Desk]:
        return iter([getattr(self, each.name) for each in fields(self)])

    def recover(self, now_s: float) -> Effects:
        """Go on where the log ends: every client is expected back."""
        state = self.steps.engine.view.state
        self.endings.common.restore()
        self.endings.recover()
        if state.round is not None or state.turns:
            self.steps.gate.round_opened((), state.round.step if state.round is not None else 1)
        for client_id, known in state.members.items():
            self.arrivals.restore(client_id, known, now_s)
        return self.openings.recover(now_s)


def roster(
    *,
    run: RunConfig,
    run_id: str,
    kind: ServerParts,
    terms: Terms,
    limits: Limits,
    admission: Admission,
    engine: Engine,
    provisions: Provisions,
    members: Members,
    queue: Queue[Work],
    mail: Mail,
    metrics: MetricsLog,
    history: History,
    now_s: float,
) -> Roster:
    """Build the desks of a run; what several of them need is made here, and given to each."""
    gate, rounds = kind.gate(run), kind.rounds(run, engine.layers.strategy.configure_train, now_s)
    sayer, common = Sayer(metrics), CommonLayers(kind=kind, engine=engine)
    office = _Office(members=members, queue=queue, mail=mail, metrics=metrics)
    excuses = Excuses(members=members, engine=engine, queue=queue, metrics=metrics)
    snapshots = Snapshots(backbone=backbone_of(run), engine=engine, **office)
    endings = Endings(run=run, rounds=rounds, engine=engine, sayer=sayer, common=common, **office)
    openings = Openings(
        run=run, gate=gate, rounds=rounds, engine=engine, sayer=sayer, common=common, endings=endings, **office
    )
    merges = Merges(
        run=run,
        gate=gate,
        rounds=rounds,
        excuses=excuses,
        snapshots=snapshots,
        common=common,
        endings=endings,
        num_tensors=len(terms.layer_shapes),
        **office,
    )
    return Roster(
        presence=Presence(run=run, limits=limits, admission=admission, **office),
        arrivals=Arrivals(
            run=run,
            kind=kind,
            terms=terms,
            greeting=_greeting(run, run_id, provisions, limits),
            admission=admission,
            gate=gate,
            rounds=rounds,
            common=common,
            openings=openings,
            engine=engine,
            **office,
        ),
        generations=Generations(members=members, queue=queue, mail=mail, caches=CacheBook(run.link)),
        waiting=Waiting(
            run=run, limits=limits, members=members, gate=gate, rounds=rounds, mail=mail, metrics=metrics, now_s=now_s
        ),
        excuses=excuses,
        steps=Steps(
            run=run,
            kind=kind,
            gate=gate,
            excuses=excuses,
            engine=engine,
            history=history,
            tensors=Tensors(terms.wire_types, frame_bytes=run.link.frame_bytes),
            **office,
        ),
        openings=openings,
        merges=merges,
        endings=endings,
        reports=Reports(common=common, endings=endings, engine=engine, queue=queue, metrics=metrics, sayer=sayer),
        snapshots=snapshots,
        files=Files(link=run.link, provisions=provisions, mail=mail),
    )


class _Office(TypedDict):
    """For almost every desk."""

    members: Members
    queue: Queue[Work]
    mail: Mail
    metrics: MetricsLog


def _greeting(run: RunConfig, run_id: str, provisions: Provisions, limits: Limits) -> Welcome:
    """Return the welcome of every client, but for its session."""
    files = provisions.files
    return Welcome(
        session="",
        session_number=0,
        run_id=run_id,
        settings=run.to_json(),
        fingerprint=run.fingerprint(),
        file_names=tuple(files),
        file_sizes=tuple(file.num_bytes for file in files.values()),
        file_hashes=tuple(file.digest for file in files.values()),
        limits=limits.announced(),
    )
