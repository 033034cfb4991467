"""Messages of every kind with contents that are legal, nearly legal or absurd, in any order, over a real connection.

No handler raises, whatever the mode: the server goes on, and an honest client among the liars finishes its run.
"""

import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faults.lying_client import WIDTH, Liar, activations
from faults.town import Town
from packed import packed

from splitfl.errors import LocalProtocolError, PeerGone
from splitfl.protocol.messages import (
    WIRE_VERSION,
    Attach,
    Backward,
    Discard,
    EndCache,
    Fetch,
    GoBack,
    Goodbye,
    Hello,
    Keep,
    Message,
    Ping,
    Ready,
    Refusal,
    Report,
    Resume,
)

pytestmark = pytest.mark.slow

NUMBERS = (0, 1, 2, 3, 5, 11, 1 << 31, 1 << 53, 1 << 62)
FLOATS = (0.0, 1.0, -1.0, 0.5, 1e30, float("nan"), float("inf"))
WORDS = ("", "evaluated", "loaded", "before", "round", "after", "client_id", "\x1b[2J", "<b>", "x" * 3000)
NAMES = ("eval_loss", "num_eval_tokens", "also:x", "also:\n", "num_examples", "wall_seconds", "event", "perplexity")
SESSIONS, MESSAGES = 25, 40

RUNS: dict[str, dict[str, Any]] = {
    "shared": {"federation__server_mode": "shared"},
    "sequential": {"federation__server_mode": "sequential"},
    "per_client": {"federation__server_mode": "per_client"},
    "frozen": {"federation__server_mode": "frozen"},
    "best round": {"federation__evaluate": "rounds", "federation__early_stopping_patience": 3},
    "FedBuff": {
        "federation__server_mode": "sequential",
        "federation__strategy": "FedBuff",
        "optimizer__lr_scheduler_type": "constant",
        "strategy__buffer_size": 1,
    },
}
QUICK: dict[str, Any] = {
    "federation__num_rounds": 2,
    "federation__local_steps": 100,
    "federation__min_available_clients": 1,
    "federation__step_timeout": 2,
    "federation__wait_timeout": 5,
    "federation__max_missed_steps": 1,
}


def any_message(liar: Liar, draw: random.Random) -> Message:
    """Make one; half of the numbers are an honest client's at its beginning."""

    def number() -> int:
        return draw.choice((0, 1, liar.request_id, *NUMBERS)) if draw.random() < 0.5 else draw.choice((0, 1))

    def numbers() -> dict[str, float]:
        return {draw.choice(NAMES): draw.choice(FLOATS) for _ in range(draw.randrange(4))}

    def tensor() -> Any:
        shapes = ((2, 5, WIDTH), (2, 5, WIDTH), (1, 1, WIDTH), (0, 5, WIDTH), (2, 5, WIDTH + 1), (3,), (64, 64, WIDTH))
        shape = draw.choice(shapes)
        if shape == (2, 5, WIDTH) and draw.random() < 0.8:
            return activations()
        return packed(torch.full(shape, draw.choice((0.1, 1e30, float("nan")))), 1 << 18)

    def lengths() -> tuple[int, ...]:
        return draw.choice(((5, 5), (5, 5), (5, 1), (0, 5), (6, 5), (), (1,), (5, 5, 5)))

    makers: tuple[Callable[[], Message], ...] = (
        lambda: Hello(wire_version=draw.choice((WIRE_VERSION, 3)), software=draw.choice(WORDS), client_id=liar.name),
        lambda: Attach(session=draw.choice((liar.welcome.session, "x"))),
        lambda: Ping(number=number()),
        lambda: Fetch(name=draw.choice((*liar.welcome.file_names, "../x", "")), offset=number()),
        lambda: Ready(round_number=number(), num_examples=number()),
        lambda: liar.forward(
            number(), number(), hidden_BSD=tensor(), lengths_B=lengths(), left_padded=draw.random() < 0.2
        ),
        lambda: liar.forward(draw.choice((0, 1)), 0, adapters_off=draw.random() < 0.2),
        lambda: Backward(request_id=liar.request_id, gradient_BSD=tensor()),
        lambda: Backward(request_id=number(), gradient_BSD=tensor()),
        lambda: liar.commit(number(), num_label_tokens=number(), loss=draw.choice(FLOATS)),
        lambda: liar.commit(1, learning_rate=draw.choice(FLOATS), clip_coefficient=draw.choice(FLOATS)),
        lambda: liar.upload(number(), num_examples=number(), num_tokens=number()),
        lambda: Report(
            topic=draw.choice(("evaluated", "loaded", *WORDS)),
            phase=draw.choice(("before", "after", *WORDS)),
            round_number=number(),
            metrics=numbers(),
            digest=draw.choice(("", "0" * 64, *WORDS)),
        ),
        lambda: Resume(held_round=number(), step=number(), commit_number=number(), pending_step=number()),
        lambda: liar.decode(number()),
        lambda: EndCache(cache_id=number()),
        lambda: Discard(step=number()),
        Keep,
        lambda: GoBack(commit_number=number()),
        lambda: Goodbye(metrics=numbers()),
    )
    return draw.choice(makers)()


def lie_at(run: Town, seed: str) -> int:
    """Have one liar after the other say what it likes until it is refused; return how often one was."""
    draw, num_refused = random.Random(seed), 0
    for session in range(SESSIONS):
        with Liar(run.port, f"mallory-{session}", run.model) as liar:
            liar.join()
            try:
                if draw.random() < 0.8:
                    liar.say(Resume(held_round=0, step=0, commit_number=0, pending_step=0))
                for _ in range(MESSAGES):
                    liar.say(any_message(liar, draw))
                    if isinstance(liar.hear(draw.choice((0.0, 0.0, 0.02))), Refusal):
                        num_refused += 1
                        break
            except (PeerGone, LocalProtocolError):  # the connection is gone, or a header was too long to be sent
                continue
    return num_refused


@pytest.mark.parametrize("kind", RUNS)
def test_no_handler_raises_and_an_honest_client_finishes(town: Callable[..., Town], kind: str) -> None:
    run = town(1, **{**QUICK, **RUNS[kind]})
    run.wait_for("step", 1)
    assert lie_at(run, kind) > SESSIONS // 2
    for name in ("server", "clinic-0"):
        code, _ = run.end_of(name)
        assert (code, "Traceback" in run.processes[name].said()) == (0, False), run.processes[name].said()[-3000:]
    assert run.verdict().problems == []


@pytest.mark.parametrize("mode", ["sequential", "per_client", "frozen"])
def test_in_loops_of_their_own(town: Callable[..., Town], mode: str) -> None:
    settings = {**QUICK, "federation__num_rounds": 0, "federation__server_mode": mode}
    run = town(0, starts=False, **settings)
    run.start("server")
    run.wait_for("waiting", 1)
    assert lie_at(run, mode) > SESSIONS // 2
    with Liar(run.port, "honest", run.model).join() as honest:
        step = honest.resume().next_step
        assert honest.step(max(step, 1)).step == max(step, 1)
    run.processes["server"].send_signal(signal.SIGTERM)
    code, said = run.end_of("server")
    assert (code, "Traceback" in run.processes["server"].said()) == (0, False), said
