"""What crosses the wire: a proxy records every byte of a run, and no token, label, text or logit is among them."""

import asyncio
import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from conftest import Finished, free_port, write_text
from torch import Tensor

from client_edge.layers.edge import Edge, MicroBatch
from client_edge.link.link import Link
from client_edge.measuring.answerer import Answerer
from splitfl.models.cut import Top

# So many in a row that they are no coincidence in a few MB of floats.
WINDOW = 8
WINDOW_LETTERS = 8


class Recorder:
    """A TCP proxy that keeps every byte, per connection and direction."""

    def __init__(self, port: int, target_port: int) -> None:
        self._port, self._target = port, target_port
        self.streams: list[bytearray] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @contextmanager
    def running(self) -> Iterator["Recorder"]:
        self._thread.start()
        assert self._ready.wait(10)
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self._port))
        self._ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0))  # for what closes at the next turn
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            await asyncio.gather(self._copy(reader, back), self._copy(there, writer))
        except asyncio.CancelledError:
            pass
        finally:
            back.close()
            writer.close()

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        stream = bytearray()
        self.streams.append(stream)
        try:
            while data := await source.read(1 << 16):
                stream += data
                target.write(data)
                await target.drain()
            target.write_eof()
        except OSError:
            pass


class Secrets:
    """What must never be seen on the wire, and the many ways it could be written there."""

    def __init__(self) -> None:
        self.needles: dict[bytes, str] = {}

    def _add(self, needle: bytes, what: str) -> None:
        self.needles.setdefault(needle, what)  # labels are ids too

    def add_text(self, text: str) -> None:
        for start in range(0, len(text) - WINDOW_LETTERS + 1, WINDOW_LETTERS):
            self._add(text[start : start + WINDOW_LETTERS].encode(), "text")

    def add_ids(self, ids: list[int], what: str) -> None:
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            window = ids[start : start + WINDOW]
            if len(set(window)) < WINDOW // 2:
                continue  # a run of one value (-100) says nothing
            for order in "<>":
                for code in "hiqfde":
                    self._add(struct.pack(f"{order}{WINDOW}{code}", *window), f"{what} as {order}{code}")
            self._add(torch.tensor(window).bfloat16().view(torch.uint8).numpy().tobytes(), f"{what} as bf16")
            if min(window) >= 0:
                self._add("".join(map(chr, window)).encode(), f"{what} as characters")
            self._add(b"".join(map(msgpack.packb, window)), f"{what} in msgpack")
            self._add(b"".join(msgpack.packb(float(i)) for i in window), f"{what} as floats in msgpack")

    def add_logits(self, logits_BSV: Tensor) -> None:
        row = logits_BSV[0, 0, :WINDOW].detach().float()
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            self._add(row.to(dtype).view(torch.uint8).numpy().tobytes(), f"logits as {dtype}")

    def found_in(self, streams: list[bytearray]) -> list[str]:
        return sorted({what for needle, what in self.needles.items() if any(needle in stream for stream in streams)})


class Watched:
    """A run whose every byte is recorded, and the values that its clients computed."""

    def __init__(self) -> None:
        self.secrets = Secrets()
        self.activations: list[bytes] = []
        self.streams: list[bytearray] = []


@pytest.fixture
def watch(
    make_model: Callable[..., Path],
    federate: Callable[..., Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Watched]:
    """Run two clients with training, every kind of evaluation, and merges, through a recorder."""

    def run(*, leaks: bool = False, **text_settings: Any) -> Watched:
        watched = Watched()
        run_blocks, run_bottom, decode = Top.forward, Edge.bottom_forward, Answerer._text

        def top(self: Top, *args: Any) -> Tensor:
            logits_BSV = run_blocks(self, *args)
            watched.secrets.add_logits(logits_BSV)
            return logits_BSV

        def bottom(self: Edge, batch: Any, **where: int) -> MicroBatch:
            for ids, labels, length in zip(
                batch.input_ids_BS.tolist(), batch.labels_BS.tolist(), batch.lengths_B, strict=True
            ):
                watched.secrets.add_ids(ids[:length], "token ids")
                watched.secrets.add_ids(labels[:length], "labels")
            micro_batch = run_bottom(self, batch, **where)
            watched.activations.append(micro_batch.hidden_BSD.detach()[0, 0].numpy().tobytes())
            return micro_batch

        def text(self: Answerer, ids: Tensor) -> str:
            watched.secrets.add_ids(ids.tolist(), "answers")
            said = decode(self, ids)
            watched.secrets.add_text(said)
            return said

        monkeypatch.setattr(Answerer, "_text", text)
        monkeypatch.setattr(Top, "forward", top)
        monkeypatch.setattr(Edge, "bottom_forward", bottom)
        directory = make_model("llama")
        data = {}
        for number, name in enumerate(("ash", "birch")):
            lines = write_text(tmp_path / f"{name}.txt", num_lines=16, seed=number, lengths=(20, 30))
            path = tmp_path / f"{name}.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for line in lines.read_text().splitlines():
                    watched.secrets.add_text(line)
                    file.write(json.dumps({"prompt": line[:8], "completion": line[8:]}) + "\n")
            data[name] = {"path": path, "eval_fraction": 0.25}
        server_port, proxy_port = free_port(), free_port()
        recorder = Recorder(proxy_port, server_port)
        with recorder.running():
            finished = federate(
                {
                    "model": {"model_name_or_path": str(directory)},
                    "train": {
                        "bottom": "full",
                        "top": "full",
                        "backbone": "full",
                        "norm_head": True,
                        "embeddings": True,
                    },
                    "federation": {
                        "num_rounds": 2,
                        "local_steps": 2,
                        "min_available_clients": 2,
                        "evaluate": "rounds",
                        **({"step_timeout": 2.0, "wait_timeout": 4.0} if leaks else {}),
                    },
                    "text": text_settings,
                    "evaluation": {
                        "measures": ["exact_match", "rouge_l", "accuracy", "macro_f1"],
                        "max_new_tokens": 12,
                    },
                    "server": {"export_model": False},
                },
                data,
                address=f"tcp://127.0.0.1:{server_port}",
                client_address=f"tcp://127.0.0.1:{proxy_port}",
            )
        assert leaks or finished.errors == {}  # a server refuses some of what leaks, after it has crossed
        watched.streams = recorder.streams
        return watched

    return run


@pytest.mark.parametrize("text", [{}, {"packing": True, "max_seq_length": 64}], ids=["an example a row", "packed"])
def test_no_secret_crosses(text: dict[str, Any], watch: Callable[..., Watched]) -> None:
    watched = watch(**text)
    assert len(watched.streams) == 8  # two clients, two connections each, two directions
    assert len(watched.secrets.needles) > 500
    assert watched.secrets.found_in(watched.streams) == []
    # the net has no hole: what may cross is seen to cross
    assert watched.activations
    assert all(any(row in stream for stream in watched.streams) for row in watched.activations)


def _leak_in_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token ids as the characters of a name in a report."""
    run_bottom, seen = Edge.bottom_forward, []

    def bottom(self: Edge, batch: Any, **where: int) -> MicroBatch:
        seen.append(batch.input_ids_BS[0].tolist())
        return run_bottom(self, batch, **where)

    send_report = Link.report

    def report(self: Link, topic: str, **rest: Any) -> None:
        said = {"also:" + "".join(map(chr, seen[0])): 1.0} if seen else {}
        send_report(self, topic, **{**rest, "metrics": rest["metrics"] | said})

    monkeypatch.setattr(Edge, "bottom_forward", bottom)
    monkeypatch.setattr(Link, "report", report)


def _leak_in_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token ids written over activations, as float32."""
    run_bottom = Edge.bottom_forward

    def bottom(self: Edge, batch: Any, **where: int) -> MicroBatch:
        micro_batch = run_bottom(self, batch, **where)
        with torch.no_grad():
            micro_batch.hidden_BSD[0, 0, :WINDOW] = batch.input_ids_BS[0, :WINDOW].float()
        return micro_batch

    monkeypatch.setattr(Edge, "bottom_forward", bottom)


def _leak_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of text as the reason for nothing in particular."""
    import client_edge.part.run

    read, seen = client_edge.part.run.read_text, []

    def read_text(config: Any, *rest: Any) -> Any:
        seen.append(json.loads(config.data.path.read_text().splitlines()[0])["completion"])
        return read(config, *rest)

    send_report = Link.report

    def report(self: Link, topic: str, **rest: Any) -> None:
        send_report(self, topic, **{**rest, "digest": seen[0]})

    monkeypatch.setattr(client_edge.part.run, "read_text", read_text)
    monkeypatch.setattr(Link, "report", report)


@pytest.mark.parametrize(
    ("leak", "kind"),
    [(_leak_in_report, "token ids"), (_leak_in_activations, "token ids"), (_leak_text, "text")],
)
def test_a_client_that_leaks_is_seen(
    leak: Callable[[pytest.MonkeyPatch], None],
    kind: str,
    watch: Callable[..., Watched],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leak(monkeypatch)
    watched = watch(leaks=True)
    assert any(what.startswith(kind) for what in watched.secrets.found_in(watched.streams))
