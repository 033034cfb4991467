"""The trust boundary: every message survives the way, and nothing but `RemoteProtocolError` comes out of bad bytes."""

import contextlib
import copy
import random
import tracemalloc
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol import messages
from splitfl.protocol.codec import MAX_HEADER_BYTES, decode, encode
from splitfl.protocol.messages import DTYPE_BYTES, KINDS, Buffer, Message, TensorFrames, wire_bytes

MAX_FRAME_BYTES = 64
NUM_MUTATIONS = 200_000

# A frozen copy: numbers on the wire are forever.
NUMBERS = {
    1: "Hello",
    2: "Welcome",
    3: "Fetch",
    4: "Chunk",
    5: "Attach",
    6: "Ping",
    7: "Pong",
    8: "Leave",
    9: "Ready",
    10: "RoundOpened",
    11: "Forward",
    12: "ForwardDone",
    13: "Backward",
    14: "BackwardDone",
    15: "Commit",
    16: "Committed",
    17: "StepRefused",
    18: "Upload",
    19: "Merged",
    20: "Report",
    21: "Goodbye",
    22: "Farewell",
    23: "Refusal",
    24: "Resume",
    25: "Resumed",
    26: "Shutdown",
    27: "Decode",
    28: "EndCache",
    29: "Discard",
    30: "Keep",
    31: "Kept",
    32: "GoBack",
    33: "WentBack",
    34: "Declined",
    35: "RoundsEnded",
    36: "Probe",
    37: "Probed",
}


@st.composite
def described(draw: st.DrawFn) -> TensorFrames:
    dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    content = draw(st.binary(min_size=(size := wire_bytes(dtype, shape)), max_size=size))
    step = draw(st.integers(1, MAX_FRAME_BYTES))
    return TensorFrames(
        dtype=dtype, shape=shape, buffers=tuple(content[at : at + step] for at in range(0, len(content), step))
    )


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(0, 2**62),
        str: st.text(max_size=20),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        TensorFrames: described(),
        TensorFrames | None: st.none() | described(),
        dict[str, float]: st.dictionaries(st.text(max_size=20), st.floats(allow_nan=False), max_size=4),
    }
    if typing.get_origin(hint) is tuple:
        return st.lists(values_of(typing.get_args(hint)[0]), max_size=4).map(tuple)
    return plain[hint]


def instances_of(kind: type[Message]) -> st.SearchStrategy[Message]:
    return st.builds(kind, **{name: values_of(hint) for name, hint in typing.get_type_hints(kind).items()})


def plain(value: Any) -> Any:
    """Return something that compares by content: messages do not, and a frame may come back as another buffer type."""
    if isinstance(value, TensorFrames):
        return value.dtype, value.shape, [bytes(buffer) for buffer in value.buffers]
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def contents(message: Message) -> dict[str, Any]:
    return {field.name: plain(getattr(message, field.name)) for field in fields(message)}


def read(frames: list[Buffer]) -> Message:
    return decode(frames, max_frame_bytes=MAX_FRAME_BYTES)


class TestRoundTrip:
    @pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.__name__)
    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def test_every_message_comes_back(self, kind: type[Message], data: st.DataObject) -> None:
        message = data.draw(instances_of(kind))
        back = read(encode(message))
        assert type(back) is kind
        assert contents(back) == contents(message)

    def test_wire_numbers_are_forever(self) -> None:
        assert {number: kind.__name__ for number, kind in KINDS.items()} == NUMBERS

    def test_every_message_has_a_number(self) -> None:
        assert set(KINDS.values()) == set(typing.get_args(messages.Message))

    def test_buffers_are_passed_on_and_not_copied(self) -> None:
        buffer = bytes(8)
        message = messages.Backward(request_id=1, gradient_BSD=TensorFrames(dtype="f32", shape=(2,), buffers=(buffer,)))
        assert encode(message)[1] is buffer

    def test_a_header_too_large_is_our_own_error(self) -> None:
        with pytest.raises(LocalProtocolError, match="header of Refusal has 65"):
            encode(messages.Refusal(code="OVER", reason="x" * MAX_HEADER_BYTES))


def packed(kind: int, plain_fields: dict[Any, Any], tensors: list[Any]) -> bytes:
    return bytes(msgpack.packb([kind, plain_fields, tensors]))


def backward(dtype: Any = "f32", shape: Any = (2,), count: Any = 1, **changed: Any) -> list[Buffer]:
    header = packed(13, {"request_id": 1, **changed}, [["gradient_BSD", dtype, shape, count]])
    return [header, bytes(8)]


BAD: dict[str, tuple[list[Buffer], str]] = {
    "no frames": ([], "no frames"),
    "empty header": ([b""], "not msgpack"),
    "not msgpack": ([b"\xc1"], "not msgpack"),
    "something after the header": ([packed(22, {}, []) + b"\x00"], "not msgpack"),
    "header too large": ([bytes(MAX_HEADER_BYTES + 1)], "header of 65537 bytes"),
    "nesting bomb": ([b"\x91" * 60_000 + b"\x90"], "not msgpack"),
    "map nesting bomb": ([b"\x81\xa1a" * 20_000 + b"\x80"], "not msgpack"),
    "array of four billion": ([b"\xdd\xff\xff\xff\xff"], "not msgpack"),
    "extension type": ([bytes(msgpack.packb([22, {}, msgpack.ExtType(5, b"x")]))], "not msgpack"),
    "timestamp for a number": ([packed(6, {"number": msgpack.Timestamp(1)}, [])], "Ping.number is no int"),
    "kind unknown": ([packed(99, {}, [])], "unknown kind 99"),
    "kind is a bool": ([packed(True, {}, [])], "not \\[kind, fields, tensors\\]"),
    "not a list": ([bytes(msgpack.packb({"kind": 1}))], "not \\[kind, fields, tensors\\]"),
    "field missing": ([packed(6, {}, [])], "Ping without number"),
    "field unknown": ([packed(6, {"number": 1, "more": 2}, [])], "Ping with unknown field 'more'"),
    "field name is bytes": ([packed(6, {"number": 1, b"x": 2}, [])], "Ping with unknown field"),
    "bool as int": ([packed(6, {"number": True}, [])], "Ping.number is no int"),
    "int as bool": ([packed(19, {"accepted": 1}, [])], "Merged without round_number"),
    "negative number": ([packed(6, {"number": -1}, [])], "Ping.number is not from 0 to 2"),
    "number too large": ([packed(6, {"number": 2**63}, [])], "Ping.number is not from 0 to 2"),
    "int as float": ([packed(16, {"step": 1, "commit_number": 1, "clip_coefficient": 1}, [])], "is no float"),
    "bytes as text": ([packed(23, {"code": "OVER", "reason": b"no"}, [])], "Refusal.reason is no str"),
    "map as list": ([packed(2, {"file_names": {}}, [])], "Welcome without session"),
    "long metric name": ([packed(21, {"metrics": {"x" * 65: 1.0}}, [])], "short names to floats"),
    "metric is an int": ([packed(21, {"metrics": {"x": 1}}, [])], "short names to floats"),
    "dtype unknown": (backward(dtype="f64"), "dtype 'f64', not one of f32, bf16, u8"),
    "dtype is a number": (backward(dtype=1), "describes a tensor in no known way"),
    "negative size": (backward(shape=(-2,)), "shape is no list of at most 8 sizes"),
    "size is a bool": (backward(shape=(2, True)), "shape is no list of at most 8 sizes"),
    "size is a float": (backward(shape=(2.0,)), "shape is no list of at most 8 sizes"),
    "nine dimensions": (backward(shape=(1,) * 9), "shape is no list of at most 8 sizes"),
    "huge sizes after a zero": (backward(shape=(0, 2**62, 2**62)), "more than 1099511627776 elements"),
    "more bytes than the shape": (backward(shape=(1,)), "8 bytes where its shape needs 4"),
    "fewer bytes than the shape": (backward(shape=(3,)), "8 bytes where its shape needs 12"),
    "frame missing": (backward(count=2), "2 frames, which did not come"),
    "negative count": (backward(count=-1), "-1 frames, which did not come"),
    "count is a bool": (backward(count=True), "describes a tensor in no known way"),
    "frame too many": ([*backward(), b"x"], "1 frames more than its header says"),
    "frame too large": ([*backward(), bytes(MAX_FRAME_BYTES + 1)], "a frame of 65 bytes, more than the 64"),
    "tensor missing": ([packed(13, {"request_id": 1}, [])], "gradient_BSD has 0 tensors where one belongs"),
    "tensor twice": (
        [packed(13, {"request_id": 1}, [["gradient_BSD", "u8", [1], 1]] * 2), b"x", b"y"],
        "gradient_BSD has 2 tensors where one belongs",
    ),
    "tensor of another message": (
        [packed(22, {}, [["gradient_BSD", "u8", [1], 1]]), b"x"],
        "describes a tensor in no known way",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("case", BAD)
    def test_the_text_names_the_rule(self, case: str) -> None:
        frames, rule = BAD[case]
        with pytest.raises(RemoteProtocolError, match=rule):
            read(frames)

    def test_a_frame_of_exactly_the_limit_passes(self) -> None:
        tensor = TensorFrames(dtype="u8", shape=(MAX_FRAME_BYTES,), buffers=(bytes(MAX_FRAME_BYTES),))
        assert type(read(encode(messages.Backward(request_id=1, gradient_BSD=tensor)))) is messages.Backward


STRANGE: list[Any] = [
    None,
    True,
    -1,
    2**63,
    2**64 - 1,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "f32",
    "x" * 3000,
    b"\xff",
    [],
    [[[]]],
    {},
    {"a": {}},
    [2**62] * 3,
    [-1],
    msgpack.ExtType(1, b"x"),
    msgpack.Timestamp(0),
]


def one_of_each() -> list[list[Buffer]]:
    found: list[list[Buffer]] = []
    two = TensorFrames(dtype="bf16", shape=(2, 3), buffers=(bytes(8), bytes(4)))
    samples: dict[Any, Any] = {
        int: 3,
        str: "name",
        float: 0.5,
        bool: True,
        TensorFrames: two,
        TensorFrames | None: two,
        tuple[TensorFrames, ...]: (two, two),
        tuple[int, ...]: (1, 2),
        tuple[str, ...]: ("a", "b"),
        dict[str, float]: {"loss": 1.0},
    }
    for kind in KINDS.values():
        found.append(encode(kind(**{name: samples[hint] for name, hint in typing.get_type_hints(kind).items()})))
    return found


def flip(frames: list[Any], draw: random.Random) -> list[Any]:
    at = draw.choice([0, 0, 0, draw.randrange(len(frames))])
    changed = bytearray(frames[at])
    for _ in range(draw.randint(1, 4)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return [*frames[:at], bytes(changed), *frames[at + 1 :]]


def truncate(frames: list[Any], draw: random.Random) -> list[Any]:
    at = draw.randrange(len(frames))
    return [*frames[:at], frames[at][: draw.randrange(len(frames[at]) + 1)], *frames[at + 1 :]]


def more_or_fewer(frames: list[Any], draw: random.Random) -> list[Any]:
    frames = list(frames)
    if draw.random() < 0.5 and len(frames) > 1:
        del frames[draw.randrange(len(frames))]
    else:
        frames.insert(draw.randrange(len(frames) + 1), bytes(draw.choice([0, 1, 12, MAX_FRAME_BYTES + 1])))
    return frames


def places(tree: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [here, *(place for key, value in inner for place in places(value, (*here, key)))]


def repack(frames: list[Any], draw: random.Random) -> list[Any]:
    tree = msgpack.unpackb(frames[0])
    *way, last = draw.choice(places(tree)[1:])
    owner = tree
    for key in way:
        owner = owner[key]
    match draw.randrange(3):
        case 0:
            owner[last] = copy.deepcopy(draw.choice(STRANGE))
        case 1:
            del owner[last]
        case _ if isinstance(owner, dict):
            owner[draw.choice(["", "extra", b"bytes", last])] = draw.choice(STRANGE)
        case _:
            owner.insert(draw.randrange(len(owner) + 1), draw.choice(STRANGE))
    return [msgpack.packb(tree), *frames[1:]]


def oversize(frames: list[Any], draw: random.Random) -> list[Any]:
    return [bytes(frames[0]) + bytes(draw.choice([1, MAX_HEADER_BYTES])), *frames[1:]]


MUTATIONS: list[Callable[[list[Any], random.Random], list[Any]]] = [
    flip,
    truncate,
    more_or_fewer,
    repack,
    repack,
    repack,
    oversize,
]


def test_mutated_messages_raise_one_error_only() -> None:
    draw = random.Random(20)
    originals = one_of_each()
    refused = 0
    for _ in range(NUM_MUTATIONS):
        frames: list[Any] = list(draw.choice(originals))
        for _ in range(draw.choice([1, 1, 2])):
            frames = draw.choice(MUTATIONS)(frames, draw) if frames and frames[0] and _is_whole(frames) else frames
        try:
            message = read(frames)
        except RemoteProtocolError:
            refused += 1
        else:
            # what is let through is a message like any other
            assert encode(read(encode(message))) == encode(message)
    assert refused > NUM_MUTATIONS // 2


def test_mutated_messages_take_no_more_memory_than_twice_the_largest() -> None:
    draw = random.Random(21)
    originals = one_of_each()
    largest = 0
    tracemalloc.start()
    try:
        for _ in range(10_000):
            frames = draw.choice(MUTATIONS)(list(draw.choice(originals)), draw)
            largest = max(largest, sum(map(len, frames)))
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            with contextlib.suppress(RemoteProtocolError):
                read(frames)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before <= 2 * max(largest, MAX_HEADER_BYTES)
    finally:
        tracemalloc.stop()


def _is_whole(frames: list[Any]) -> bool:
    """Tell whether a first mutation left something that a second can take apart."""
    try:
        header = msgpack.unpackb(frames[0])
    except ValueError:
        return False
    return isinstance(header, list) and len(header) > 1 and all(len(frame) > 0 for frame in frames)
