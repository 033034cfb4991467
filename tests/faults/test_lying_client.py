"""What one lying client tries, and what happens: it is told, it is struck, and the others end their run.

A row each in the table of docs/reliability.md. The server is a process of its own, with keys where they matter.
"""

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from conftest import write_text
from faults.lying_client import Liar, flood
from faults.town import Town

from splitfl.protocol.messages import (
    WIRE_VERSION,
    Attach,
    EndCache,
    Farewell,
    Fetch,
    GoBack,
    Goodbye,
    Hello,
    Keep,
    Leave,
    Message,
    Ping,
    Ready,
    Refusal,
    Report,
    Resume,
    Resumed,
    StepRefused,
    Welcome,
)

pytestmark = pytest.mark.slow

LONG = {"federation__min_available_clients": 1, "federation__num_rounds": 1, "federation__local_steps": 60}


@pytest.fixture
def lie(town: Callable[..., Town]) -> Iterator[Callable[..., Liar]]:
    """Have a liar join a town."""
    with ExitStack() as stack:

        def join(run: Town, name: str = "mallory", **keys: Any) -> Liar:
            return stack.enter_context(Liar(run.port, name, run.model, **keys)).join()

        yield join


def at_work(town: Callable[..., Town]) -> Town:
    """Return a run whose honest client works, and is not through with its round before `all_end_well`."""
    run = town(1, **LONG, pause={"clinic-0": "step-before-record:40:60"})
    run.wait_for("step", 2)
    return run


def all_end_well(run: Town) -> None:
    """The honest ones finish, and nothing of theirs was lost."""
    for name in run.names:
        run.go_on(name)
    for name in ("server", *run.names):
        code, said = run.end_of(name)
        assert code == 0, f"{name}: {said}"
    assert run.verdict().problems == []


TOTALS = {
    "a name of the event itself": {"client_id": 1.0},
    "another name of it": {"event": 1.0, "time": 2.0},
    "a name that is none": {"x": 1.0},
    "half a count": {"num_examples": 0.5},
    "not a number": {"wall_seconds": float("nan")},
    "endless": {"bytes_sent": float("inf")},
    "negative": {"compute_seconds": -1.0},
    "a thousand names": {f"n{number}": 1.0 for number in range(1000)},
}


class TestWhatIsWrittenDown:
    """2.5 of the issue: `Goodbye(metrics={"client_id": 1.0})` ended the server; R33."""

    def test_totals_that_are_none(self, town: Callable[..., Town], lie: Callable[..., Liar]) -> None:
        run = at_work(town)
        for number, totals in enumerate(TOTALS.values()):
            liar = lie(run, f"mallory-{number}")
            liar.resume()
            liar.say(Goodbye(metrics=totals))
            refusal = liar.refusal()
            assert (refusal.code, "goodbye" in refusal.reason) == ("VIOLATION", True), refusal.reason
        assert run.events("client_done") == []
        assert len(run.events("violation")) == len(TOTALS)
        all_end_well(run)

    def test_no_totals_at_all_are_a_goodbye_and_the_report_is_written(
        self, town: Callable[..., Town], lie: Callable[..., Liar]
    ) -> None:
        run = at_work(town)
        liar = lie(run)
        liar.resume()
        liar.say(Goodbye(metrics={}))
        liar.wait_for(Farewell)
        all_end_well(run)
        (mallory,) = [client for client in run.report()["clients"] if client["client_id"] == "mallory"]
        assert mallory["num_examples"] is None

    def test_measures_digests_and_words(self, town: Callable[..., Town], lie: Callable[..., Liar]) -> None:
        run = at_work(town)
        usual = {"topic": "evaluated", "phase": "before", "round_number": 0, "metrics": {}, "digest": ""}
        lies: list[dict[str, Any]] = [
            {"metrics": {"also:\x1b[2J": 1.0}},
            {"metrics": {"also:<script>": 1.0}},
            {"metrics": {f"also:{number}": 1.0 for number in range(17)}},
            {"metrics": {"client_id": 1.0}},
            {"metrics": {"eval_loss": 1e300}},
            {"topic": "loaded", "digest": "<img src=x>"},
            {"topic": "loaded", "digest": "g" * 64},
            {"topic": "loaded", "digest": "0" * 64, "round_number": 1 << 62},
            {"digest": "0" * 64},
            {"round_number": 1 << 62},
        ]
        for number, changed in enumerate(lies):
            liar = lie(run, f"mallory-{number}")
            liar.resume()
            liar.say(Report(**{**usual, **changed}))
            assert liar.refusal().code == "VIOLATION"
        all_end_well(run)
        assert len(run.events("violation")) == len(lies)
        page = (run.run_dir / "report.html").read_text()
        assert "also:<script>" not in page
        assert "\x1b" not in (run.run_dir / "metrics.jsonl").read_text()

    def test_words_of_parting_steer_no_terminal_and_no_page(
        self, town: Callable[..., Town], lie: Callable[..., Liar]
    ) -> None:
        run = at_work(town)
        liar = lie(run)
        liar.resume()
        liar.say_on_control(
            Leave(reason="\x1b]0;owned\x07\x1b[2J\n<script>alert(1)</script>" + "x" * 5000, comes_back=False)
        )
        run.wait_for_client("mallory", "client_left", 1)
        all_end_well(run)
        (left,) = [event for event in run.events("client_left") if event["client_id"] == "mallory"]
        assert len(left["reason"]) <= 200
        assert left["reason"].isprintable()
        said = run.processes["server"].said() + run.processes["server"].printed()
        assert "\x1b]0;" not in said
        assert "<script>alert" not in (run.run_dir / "report.html").read_text()


OWN_LOOPS = {"federation__num_rounds": 0, "federation__server_mode": "sequential"}
DIGEST = "0" * 64

AT_ANY_TIME: dict[str, Callable[[Liar], Callable[[int], Message]]] = {
    "EndCache": lambda _: lambda number: EndCache(cache_id=number),
    "Report": lambda _: lambda _n: Report(topic="loaded", phase="round", round_number=0, metrics={}, digest=DIGEST),
    "Fetch": lambda liar: lambda _n: Fetch(name=liar.welcome.file_names[0], offset=0),
    "Hello": lambda liar: lambda _n: Hello(wire_version=WIRE_VERSION, software="liar", client_id=liar.name),
    "Attach": lambda liar: lambda _n: Attach(session=liar.welcome.session),
    "Ping": lambda _: lambda number: Ping(number=number),
    "Ready": lambda _: lambda _n: Ready(round_number=0, num_examples=1),
    "an evaluation": lambda liar: lambda _n: liar.forward(0),
    "Decode": lambda liar: lambda number: liar.decode(cache_id=number),
    "Upload, too late": lambda liar: lambda _n: liar.upload(0),
}
IN_OWN_LOOPS: dict[str, Callable[[Liar], Callable[[int], Message]]] = {
    "Keep": lambda _: lambda _n: Keep(),
    "GoBack": lambda _: lambda _n: GoBack(commit_number=0),
    "Discard": lambda liar: liar.discards,
}


def memory_of(run: Town) -> int:
    return psutil.Process(run.processes["server"].pid).memory_info().rss


class TestQueues:
    """2.11 of the issue: what is legal at any time, 200,000 times; R40."""

    @pytest.mark.parametrize("kind", AT_ANY_TIME)
    def test_of_what_is_legal_at_any_time(self, town: Callable[..., Town], lie: Callable[..., Liar], kind: str) -> None:
        run = at_work(town)
        liar = lie(run)
        liar.resume()
        before = memory_of(run)
        refusal = flood(liar, AT_ANY_TIME[kind](liar))
        assert refusal.code == "VIOLATION", refusal.reason
        assert memory_of(run) - before < 64 << 20
        all_end_well(run)
        assert 1 <= len(run.events("violation")) <= 3  # what was on its way may be another

    @pytest.mark.parametrize("kind", IN_OWN_LOOPS)
    def test_in_a_loop_of_its_own(self, town: Callable[..., Town], lie: Callable[..., Liar], kind: str) -> None:
        paused = {"server": "forward:1:60"}  # what is given up costs nothing: a quick machine would keep pace
        run = town(0, starts=False, federation__min_available_clients=1, pause=paused, **OWN_LOOPS)
        run.start("server")
        run.wait_for("waiting", 1)
        liar = lie(run)
        liar.resume()
        before = memory_of(run)
        refusal = flood(liar, IN_OWN_LOOPS[kind](liar))
        assert refusal.code == "VIOLATION", refusal.reason
        assert memory_of(run) - before < 64 << 20

    def test_resume_before_resuming(self, town: Callable[..., Town], lie: Callable[..., Liar]) -> None:
        run = at_work(town)
        liar = lie(run)
        before = memory_of(run)
        refusal = flood(liar, lambda _: Resume(held_round=0, step=0, commit_number=0, pending_step=0))
        assert (refusal.code, "Resume" in refusal.reason) == ("VIOLATION", True), refusal.reason
        assert memory_of(run) - before < 64 << 20
        all_end_well(run)

    def test_a_resume_that_cannot_be(self, town: Callable[..., Town], lie: Callable[..., Liar]) -> None:
        """It is told to go back three times, which a server that has lost its log would; then it is struck."""
        run = at_work(town)
        lies = Resume(held_round=0, step=1 << 40, commit_number=1 << 40, pending_step=0)
        liar = lie(run)
        for _ in range(3):
            liar.say(lies)
            assert liar.wait_for(Resumed).verdict == "rewind"
        liar.say(lies)
        assert liar.refusal().code == "VIOLATION"
        for code in ("VIOLATION", "QUARANTINED"):
            liar = lie(run)
            liar.say(lies)
            assert liar.refusal().code == code
        assert len((run.run_dir / "metrics.jsonl").read_text().splitlines()) < 400
        all_end_well(run)

    def test_sessions_without_end(self, town: Callable[..., Town], lie: Callable[..., Liar]) -> None:
        """Hello on new connections: four may be open, and sixty begun in short order."""
        run = at_work(town)
        with ExitStack() as stack:
            liars = [stack.enter_context(Liar(run.port, "mallory", run.model)) for _ in range(80)]
            answers = []
            for liar in liars:
                liar.say(Hello(wire_version=WIRE_VERSION, software="liar", client_id="mallory"))
                answers.append(liar.hear(5.0))
            assert sum(isinstance(answer, Welcome) for answer in answers) <= 62
            assert [answer.code for answer in answers if isinstance(answer, Refusal)].count("FULL") >= 18
            told = [liar.hear(1.0) for liar in liars[:50]]
            assert {answer.code for answer in told if isinstance(answer, Refusal)} == {"NO_SESSION"}
        all_end_well(run)


class TestMishaps:
    """2.4 of the issue: what cannot be done for one client is that client's affair; R32."""

    def test_too_little_memory_for_one_client(self, town: Callable[..., Town]) -> None:
        run = town(
            2,
            starts=False,
            model={"max_position_embeddings": 1024},
            model__attn_implementation="eager",
            text__max_seq_length=1024,
            federation__num_rounds=1,
            federation__local_steps=2,
            federation__per_device_train_batch_size=16,
            federation__gradient_accumulation_steps=1,
            federation__step_timeout=60,
        )
        write_text(run.folder / "1.txt", num_lines=20, seed=1, lengths=(1000, 1000))
        run.start("server")
        run.wait_for("waiting", 1)
        server = psutil.Process(run.processes["server"].pid)
        most = server.memory_info().vms + (900 << 20)
        resource.prlimit(server.pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        run.start("clinic-0")
        run.start("clinic-1")
        code, said = run.end_of("clinic-1")
        assert (code, "TOO_LARGE" in said, "client.micro_batch_rows" in said) == (8, True, True), said
        assert "16 x 1001 tokens of clinic-1" in said or "16 x 1000 tokens of clinic-1" in said
        assert [event["count"] for event in run.events("failed")] == [1, 2, 3]
        config = run.config("clinic-1").read_text().replace("[client]\n", "[client]\nmicro_batch_rows = 1\n")
        run.config("clinic-1").write_text(config)
        run.start("clinic-1")
        all_end_well(run)
        assert {event["client_id"] for event in run.events("step")} == set(run.names)
        assert run.events("violation") == []

    def test_a_file_that_cannot_be_read(self, town: Callable[..., Town]) -> None:
        paused = {"clinic-0": "step-before-record:40:60"}
        run = town(2, starts=False, federation__min_available_clients=1, federation__num_rounds=1, pause=paused)
        run.config("clinic-1").write_text(
            run.config("clinic-1").read_text().replace(str(run.folder / "cache"), str(run.folder / "other-cache"))
        )
        run.start("server")
        run.start("clinic-0")
        run.wait_for("step", 2)
        (run.run_dir / "adapters.safetensors").rename(run.run_dir / "gone")
        run.start("clinic-1")
        code, said = run.end_of("clinic-1")
        assert (code, "cannot read adapters.safetensors" in said) == (8, True), said
        assert str(run.run_dir) not in said
        (run.run_dir / "gone").rename(run.run_dir / "adapters.safetensors")
        run.start("clinic-1")
        run.wait_for_client("clinic-1", "client_joined", 1)
        all_end_well(run)
        assert run.events("violation") == []


class TestWhoOnlyPings:
    """2.7 of the issue: out after a stated number of steps, and the others keep their rate; R35."""

    SETTINGS: dict[str, Any] = {
        "federation__num_rounds": 1,
        "federation__local_steps": 30,
        "federation__min_available_clients": 2,
        "federation__step_timeout": 1,
        "federation__max_missed_steps": 2,
        "federation__wait_timeout": 30,
    }

    @pytest.mark.parametrize(
        ("mode", "does"),
        [
            ("shared", "nothing"),
            ("shared", "begins steps"),
            ("sequential", "begins steps"),
            ("per_client", "nothing"),
            ("frozen", "steps, and never uploads"),
        ],
    )
    def test_in_a_round(self, town: Callable[..., Town], mode: str, does: str) -> None:
        run = town(1, federation__server_mode=mode, **self.SETTINGS)
        run.wait_for("waiting", 1)
        stopping, begun = threading.Event(), time.monotonic()
        acting = threading.Thread(target=self._act, args=(run, does, stopping), daemon=True)
        acting.start()
        try:
            run.wait_for("round_opened", 1)
            begun = time.monotonic()
            all_end_well(run)
        finally:
            stopping.set()
            acting.join(timeout=10)
        # two time-outs, then a fifth of the time at most; else sixty steps would take a minute, a round an hour
        assert time.monotonic() - begun < 45
        assert len([event for event in run.events("step") if event["client_id"] == "clinic-0"]) == 30
        assert "mallory" in {event["client_id"] for event in run.events("sits_out")}

    @staticmethod
    def _act(run: Town, does: str, stopping: threading.Event) -> None:
        with Liar(run.port, "mallory", run.model).join() as liar:
            liar.resume()
            step = liar.ready().first_step
            if does == "steps, and never uploads":
                liar.step(step)
            begins = does == "begins steps"
            while not stopping.is_set():
                if begins:
                    liar.say(liar.forward(step))
                    begins = False
                match liar.hear(0.2):
                    case StepRefused(next_step=next_step):
                        step, begins = next_step, does == "begins steps"
                    case Refusal():
                        return

    def test_never_ready_and_never_says_goodbye(self, town: Callable[..., Town], lie: Callable[..., Liar]) -> None:
        run = town(1, **{**self.SETTINGS, "federation__min_available_clients": 1, "federation__num_rounds": 2})
        run.wait_for("waiting", 1)
        liar = lie(run)
        liar.resume()
        begun = time.monotonic()
        all_end_well(run)
        assert time.monotonic() - begun < 40
        assert [event["client_id"] for event in run.events("sits_out")] == ["mallory"]

    def test_it_is_taken_back_when_it_has_work_to_show(
        self, town: Callable[..., Town], lie: Callable[..., Liar]
    ) -> None:
        paused = {"clinic-0": "step-before-record:10:60"}
        run = town(1, federation__server_mode="shared", pause=paused, **self.SETTINGS)
        run.wait_for("waiting", 1)
        liar = lie(run)
        liar.resume()
        liar.ready()
        run.wait_for("sits_out", 1)
        liar.say(liar.forward(1))
        while liar.wait_for(StepRefused).next_step < 3:
            pass
        message = liar.forward(_last_refusal(liar).next_step)
        liar.say(message)
        run.wait_for("taken_back", 1)
        all_end_well(run)


def _last_refusal(liar: Liar) -> StepRefused:
    return [each for each in liar.heard if isinstance(each, StepRefused)][-1]
