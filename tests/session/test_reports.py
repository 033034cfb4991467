"""What a client reports of an evaluation is a number from a closed list, within its range."""

import math

import pytest
from sample_messages import terms

from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Report
from splitfl.session.server_session import ServerSession


def report(topic: str = "evaluated", phase: str = "round", **metrics: float) -> Report:
    return Report(topic=topic, phase=phase, round_number=1, metrics=metrics, digest="")


def test_measures_and_counts_are_taken() -> None:
    session = ServerSession(terms())
    told = report(eval_loss=2.5, perplexity=12.2, token_accuracy=0.25, num_eval_tokens=100.0, **{"also:other": 3.0})
    assert session.receive(told) is told


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (report(eval_loss=math.nan), "eval_loss = nan"),
        (report(eval_loss=math.inf), "finite"),
        (report(token_accuracy=1.5), "token_accuracy = 1.5, which must be from 0 to 1"),
        (report(rouge_l=-0.1), "rouge_l"),
        (report(num_eval_tokens=2.5), "must be a count"),
        (report(secret=1.0), "'secret', which is none of"),
        (report(topic="said"), "a report of 'said'"),
        (report(phase="later"), "in phase 'later'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_refused_and_changes_nothing(wrong: Report, why: str) -> None:
    session = ServerSession(terms())
    with pytest.raises(RemoteProtocolError, match=why):
        session.receive(wrong)
    for _ in range(64):  # it was not counted
        session.receive(report())
