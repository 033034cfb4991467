"""Servers that go away in the middle of a user's loop, other clients in it, and clients that come again."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from own_loop.host import Host, adamw, batches, differing, settings, train, trained_of, whole_model, write_model

import client_edge
from server_backbone.replay import replay
from splitfl.config.reading import to_toml
from splitfl.config.trees import ServerConfig
from splitfl.errors import ConfigError, Refused

Start = Callable[..., Host]


class TestGoingOn:
    def test_a_server_that_is_stopped_in_the_middle_of_a_step(self, host: Start) -> None:
        server = host()
        split, whole = server.connect(), whole_model(server.directory, is_lora=True)
        given = batches(8)

        def again_and_again() -> Any:
            for number, batch in enumerate(given):
                if number in (3, 6):  # between the two micro-batches of a step, and between two steps
                    server.stop()
                    server.start()
                yield batch

        losses = train(split, adamw(split), again_and_again(), every=2, clip=0.5)

        assert losses == train(whole, adamw(whole), given, every=2, clip=0.5)
        mine = {name: layer.clone() for name, layer in client_edge.own_layers(split).items()}
        server.stop()
        assert differing(mine | server.backbone(), trained_of(whole)) == []

    @pytest.mark.slow
    def test_a_server_that_is_killed_again_and_again(self, tmp_path: Path) -> None:
        """At every point of a commit, and in the middle of a step."""
        process = Process(tmp_path, ["commit-before-record:2", "commit-after-record:1", "commit-acknowledged:1", ""])
        try:
            model = process.connect()
            whole = whole_model(tmp_path / "model", is_lora=True)
            given = batches(12)

            def killed() -> Any:
                for number, batch in enumerate(given):
                    if number == 9:
                        process.kill()
                    yield batch

            losses = train(model, adamw(model), killed(), every=2, clip=0.5)
            assert process.starts == 5
            assert losses == train(whole, adamw(whole), given, every=2, clip=0.5)
            mine = {name: layer.clone() for name, layer in client_edge.own_layers(model).items()}
            assert differing(mine | process.stopped(), trained_of(whole)) == []
        finally:
            process.end()

    def test_a_kept_snapshot_outlives_a_log_that_was_lost(self, host: Start) -> None:
        server = host(storage={"durability": "snapshot", "fsync": "never"})
        model, given = server.connect(), batches(3)
        optimizer = adamw(model)
        train(model, optimizer, given[:2])
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = self.logits(model, given[2])
        train(model, optimizer, given)
        client_edge.disconnect(model)
        server.stop()
        for path in (server.run_dir / "state").glob("*-0000000[1-9].bin"):
            if not path.name.startswith("kept"):
                path.unlink()  # as if it had died before it could take its last snapshot
        server.start()
        again = server.connect()
        again.load_state_dict(state)
        assert torch.equal(self.logits(again, given[2]), expected)
        train(again, adamw(again), given[:1])
        assert [event["commit_number"] for event in server.events("step")] == [1, 2, 3, 4, 5, 3]

    def logits(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return model(**batch).logits

    def test_a_client_that_comes_again_goes_on_after_its_last_step(self, host: Start) -> None:
        server = host()
        first = server.connect()
        train(first, adamw(first), batches(2))
        client_edge.disconnect(first)
        again = server.connect()
        train(again, adamw(again), batches(1))
        assert [event["step"] for event in server.events("step")] == [1, 2, 3]

    def test_a_server_that_was_rolled_back_is_no_longer_this_models(self, host: Start) -> None:
        server = host()
        model = server.connect()
        optimizer = adamw(model)
        train(model, optimizer, batches(2))
        server.stop()
        server.roll_back(0)
        server.start()
        with pytest.raises(Refused, match="the server has gone back to step 0 of this client"):
            train(model, optimizer, batches(1))

    def test_the_log_leads_to_the_same_weights_with_a_going_back_in_it(self, host: Start) -> None:
        server = host(storage={"keep_snapshots": 0, "snapshot_steps": 2, "fsync": "never"})
        model = server.connect()
        optimizer = adamw(model)
        train(model, optimizer, batches(1), clip=0.1)
        state = model.state_dict()
        train(model, optimizer, batches(3))
        model.load_state_dict(state)
        train(model, optimizer, batches(2), clip=0.2)
        server.stop()
        found = replay(server.run_dir)
        assert found.problems == []
        assert (found.commits, found.last_commit) == (6, 6)


class TestSeveralClients:
    def test_take_turns_step_by_step(self, host: Start) -> None:
        server = host()
        models = {name: server.connect(name) for name in ("a", "b")}
        threads = [
            threading.Thread(target=train, args=(model, adamw(model), batches(6)), kwargs={"every": 2})
            for model in models.values()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        steps = server.events("step")
        done = sorted((event["client_id"], event["step"]) for event in steps)
        assert done == [(name, step) for name in "ab" for step in (1, 2, 3)]
        assert [event["commit_number"] for event in steps] == [1, 2, 3, 4, 5, 6]

    def test_one_that_keeps_others_waiting_loses_its_step_on_both_sides(self, host: Start) -> None:
        server = host(federation={"num_rounds": 0, "server_mode": "sequential", "step_timeout": 0.5})
        slow, quick = server.connect("slow"), server.connect("quick")
        optimizer = adamw(slow)
        slow.train()
        slow(**batches(1)[0]).loss.backward()
        train(quick, adamw(quick), batches(1))  # waits until the slow one's turn is over
        before = {name: layer.clone() for name, layer in client_edge.own_layers(slow).items()}
        with pytest.raises(Refused, match=r"step 1 is applied on neither side: its turn ended after 0\.5 s"):
            slow(**batches(1)[0]).loss.backward()
        optimizer.step()
        assert differing(client_edge.own_layers(slow), before) == []
        train(slow, optimizer, batches(1))
        assert [(event["client_id"], event["step"]) for event in server.events("step")] == [("quick", 1), ("slow", 2)]

    def test_one_alone_may_take_its_time(self, host: Start) -> None:
        server = host(federation={"num_rounds": 0, "server_mode": "sequential", "step_timeout": 0.3})
        model = server.connect()
        model.train()
        loss = model(**batches(1)[0]).loss
        time.sleep(1.0)
        loss.backward()
        adamw(model).step()
        assert len(server.events("step")) == 1


class TestRuns:
    def test_of_rounds_are_not_for_loops(self, host: Start) -> None:
        server = host(federation={"num_rounds": 1})
        with pytest.raises(ConfigError, match="serves a run of 1 round: take part in it with `splitfl client`"):
            server.connect()

    def test_without_rounds_are_not_for_the_command(self, host: Start, tmp_path: Path) -> None:
        from client_edge.part.run import take_part
        from splitfl.config.trees import ClientConfig

        text = tmp_path / "text.txt"
        text.write_text("abc\n" * 5, encoding="utf-8")
        client = {"client_id": "clinic", "server_address": host().address, "output_dir": tmp_path / "out"}
        config = ClientConfig.from_tree({"client": client, "data": {"path": text}}, source="test")
        with pytest.raises(ConfigError, match="has no rounds"):
            take_part(config, accept=True)

    def test_a_shared_step_needs_rounds(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match='set server_mode to "sequential", "per_client" or "frozen"'):
            ServerConfig.from_tree(
                settings(tmp_path, federation={"num_rounds": 0, "server_mode": "shared"}), source="test"
            )


class Process:
    """A server in a process of its own, started again whenever it dies."""

    def __init__(self, folder: Path, crashes: list[str]) -> None:
        """`crashes` are where each start but the last ends; "" is where the test kills it."""
        self._host = Host.__new__(Host)  # its settings, not its thread
        link = {"heartbeat_interval": 0.3, "heartbeat_timeout": 1.5, "slowest_link_bytes_per_second": 1e7}
        self._host.configure(folder, settings(write_model(folder / "model"), link=link))
        self._config = folder / "server.toml"
        self._config.write_text(to_toml(self._host.config), encoding="utf-8")
        self._crashes = crashes
        self.starts = 0
        self._start()
        threading.Thread(target=self._start_again, daemon=True).start()

    def connect(self) -> torch.nn.Module:
        return self._host.connect(connect_timeout=60.0)

    def _start(self) -> None:
        crash = (self._crashes[self.starts :] or [""])[0]
        self.starts += 1
        self._process = Forked(
            "server_backbone",
            "--config",
            str(self._config),
            said=self._config.with_suffix(f".{self.starts}.said"),
            env={**os.environ, **({"SPLITFL_CRASH": crash} if crash else {})},
        )

    def _start_again(self) -> None:
        while self._process.wait() != 0 and self.starts <= len(self._crashes):
            self._start()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    def stopped(self) -> dict[str, torch.Tensor]:
        """Stop the server as an operator does, and return what it has learned."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(timeout=30) == 0
        return self._host.backbone()

    def end(self) -> None:
        self._crashes = []
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
