"""The server's tables: one desk for each effect and message, and one doer for each kind of work."""

from collections import Counter
from typing import get_args, get_type_hints

from server_backbone.desks.desk import Desk, Effect, HasLeft, Lost
from server_backbone.desks.roster import Roster
from server_backbone.engine import work
from server_backbone.engine.keeping import Keeping
from server_backbone.engine.merges import Merges
from server_backbone.engine.micro_batches import MicroBatches
from server_backbone.engine.steps import Steps

DESKS: list[type[Desk]] = list(get_type_hints(Roster).values())
HEARD_BY_ALL = {Lost, HasLeft}
DONE_BY_THE_ENGINE = {work.Write, work.Settle}


def test_each_effect_is_carried_out_by_one_desk() -> None:
    carried = Counter(effect for desk in DESKS for effect in desk.carries)
    assert set(carried) == set(get_args(Effect)) - HEARD_BY_ALL
    assert set(carried.values()) == {1}


def test_no_message_and_no_result_has_two_desks() -> None:
    assert max(Counter(message for desk in DESKS for message in desk.takes).values()) == 1
    finished = Counter(each for desk in DESKS for each in desk.finishes)
    assert max(finished.values()) == 1
    assert set(finished) <= set(get_args(work.Work))


def test_each_kind_of_work_has_one_doer() -> None:
    parts = [part.__new__(part) for part in (MicroBatches, Steps, Merges, Keeping)]
    done = Counter(kind for part in parts for kind in part.doers())
    assert set(done) == set(get_args(work.Work)) - DONE_BY_THE_ENGINE
    assert set(done.values()) == {1}
