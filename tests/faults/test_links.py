"""Links that are slow, broken or silent: nothing is lost, and a slow one is never taken for a dead one."""

from collections.abc import Callable, Iterator

import pytest
from conftest import write_text
from faults.town import Town

from benchmarks.proxy import ChaosProxy

pytestmark = pytest.mark.slow


@pytest.fixture
def proxied(town: Callable[..., Town]) -> Iterator[Callable[..., tuple[Town, ChaosProxy]]]:
    proxies: list[ChaosProxy] = []

    def start(**settings: object) -> tuple[Town, ChaosProxy]:
        run = town(1, starts=False, **settings)
        proxies.append(ChaosProxy(run.port, seed=1))
        text = run.config("clinic-0").read_text()
        run.config("clinic-0").write_text(text.replace(f":{run.port}", f":{proxies[-1].port}"))
        return run, proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


def test_two_megabits_carry_the_largest_tensor_without_a_reconnection(
    proxied: Callable[..., tuple[Town, ChaosProxy]],
) -> None:
    """0.5 MiB takes 2 s here, close to the heartbeat timeout of 3 s: the same as 2 MiB with the default of 10 s."""
    run, proxy = proxied(
        federation__num_rounds=1,
        federation__local_steps=2,
        federation__per_device_train_batch_size=64,
        federation__gradient_accumulation_steps=2,
        text__max_seq_length=64,
        link__frame_bytes=1 << 17,
        link__slowest_link_bytes_per_second=250_000,
    )
    write_text(run.folder / "0.txt", num_lines=70, seed=0, lengths=(63, 63))
    for harm in proxy.harm.values():
        harm.bytes_per_second = 250_000
    run.start("server")
    run.wait_for("waiting", 1)
    run.start("clinic-0")
    assert [run.end_of(name)[0] for name in ("clinic-0", "server")] == [0, 0]
    # one to hear of the settings, whose link is not the default one, then data and control, once
    assert proxy.connections == 3
    assert run.events("client_lost") == []


def test_cuts_silence_and_damage_lose_nothing(proxied: Callable[..., tuple[Town, ChaosProxy]]) -> None:
    run, proxy = proxied(federation__num_rounds=2, federation__local_steps=60)
    run.start("server")
    run.wait_for("waiting", 1)
    run.start("clinic-0")
    harms: list[Callable[[], None]] = [
        proxy.cut,
        lambda: proxy.silence(5.0),
        lambda: setattr(proxy.harm["up"], "flips", 2),
        lambda: proxy.silence(5.0, "down"),
        lambda: setattr(proxy.harm["down"], "flips", 2),
    ]
    for number, harm in enumerate(harms, start=1):
        run.wait_for("step", 10 * number)
        harm()
    run.keep_alive()
    assert proxy.flipped == 4
    assert proxy.connections > 6
    verdict = run.verdict()
    assert verdict.problems == []
    assert verdict.steps_acknowledged == 120
    assert run.differs_from_replay() == []
