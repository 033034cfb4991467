"""Messages to frames and back: the one trust boundary.

The first frame is a msgpack header `[kind, {field: value}, [[field, dtype, shape, number of frames], ...]]`; the other
frames are the tensors' bytes, in the header's order. Nothing else is on the wire, and nothing is ever unpickled.
"""

import math
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import msgpack

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.messages import DTYPE_BYTES, KINDS, Buffer, Message, TensorFrames

MAX_HEADER_BYTES = 1 << 16
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 40
_MAX_INT = 1 << 62

_NUMBERS = {kind: number for number, kind in KINDS.items()}


def encode(message: Message) -> list[Buffer]:
    """Return the frames of a message; the buffers of its tensors are passed on, not copied."""
    kind = type(message)
    plain: dict[str, Any] = {}
    tensors: list[list[Any]] = []
    frames: list[Buffer] = []
    for field in fields(kind):
        value = getattr(message, field.name)
        if field.name not in _TENSOR_FIELDS[kind]:
            plain[field.name] = value
            continue
        for tensor in _as_tuple(value):
            tensors.append([field.name, tensor.dtype, tensor.shape, len(tensor.buffers)])
            frames += tensor.buffers
    header = msgpack.packb([_NUMBERS[kind], plain, tensors])
    if len(header) > MAX_HEADER_BYTES:
        raise LocalProtocolError(f"the header of {kind.__name__} has {len(header)} bytes, more than {MAX_HEADER_BYTES}")
    return [header, *frames]


def payload(frames: Iterable[Buffer]) -> int:
    """Return the bytes of a message's frames."""
    return sum(map(len, frames))


def decode(frames: Sequence[Buffer], *, max_frame_bytes: int) -> Message:
    """Rebuild the message, or raise `RemoteProtocolError` naming the rule; never anything else."""
    if not frames:
        raise RemoteProtocolError("a message of no frames")
    for buffer in frames[1:]:
        if len(buffer) > max_frame_bytes:
            raise RemoteProtocolError(f"a frame of {len(buffer)} bytes, more than the {max_frame_bytes} agreed on")
    match _unpack(frames[0]):
        case [int(number), dict(plain), list(tensors)] if type(number) is int and number in KINDS:
            return _build(KINDS[number], plain, tensors, frames[1:])
        case [int(number), _, _] if type(number) is int:
            raise RemoteProtocolError(f"a message of unknown kind {number}")
    raise RemoteProtocolError("a header that is not [kind, fields, tensors]")


def _unpack(header: Buffer) -> Any:
    if len(header) > MAX_HEADER_BYTES:
        raise RemoteProtocolError(f"a header of {len(header)} bytes, more than {MAX_HEADER_BYTES}")
    try:
        return msgpack.unpackb(header, ext_hook=_refuse_extension, strict_map_key=True)
    except ValueError as error:  # what msgpack raises for anything it cannot read
        raise RemoteProtocolError(f"a header that is not msgpack ({type(error).__name__})") from None


def _refuse_extension(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _build(kind: type[Message], plain: dict[Any, Any], tensors: list[Any], buffers: Sequence[Buffer]) -> Message:
    values: dict[str, Any] = {}
    for name, check in _PLAIN_FIELDS[kind].items():
        if name not in plain:
            raise RemoteProtocolError(f"{kind.__name__} without {name}")
        values[name] = check(plain[name], f"{kind.__name__}.{name}")
    if unknown := set(plain) - set(values):
        raise RemoteProtocolError(f"{kind.__name__} with unknown field {min(map(repr, unknown)):.40}")
    found = _take_tensors(kind, tensors, buffers)
    for name, many in _TENSOR_FIELDS[kind].items():
        values[name] = _fit(kind, name, many, found.pop(name, []))
    return kind(**values)


def _take_tensors(
    kind: type[Message], described: list[Any], buffers: Sequence[Buffer]
) -> dict[str, list[TensorFrames]]:
    found: dict[str, list[TensorFrames]] = {}
    left: Iterator[Buffer] = iter(buffers)
    taken = 0
    for description in described:
        match description:
            case [str(name), str(dtype), [*shape], int(count)] if name in _TENSOR_FIELDS[kind] and type(count) is int:
                _check_shape(kind, dtype, shape)
                if not 0 <= count <= len(buffers) - taken:
                    raise RemoteProtocolError(f"{kind.__name__}.{name} says it has {count} frames, which did not come")
                tensor = TensorFrames(dtype=dtype, shape=tuple(shape), buffers=tuple(next(left) for _ in range(count)))
                taken += count
                _check_size(kind, tensor)
                found.setdefault(name, []).append(tensor)
            case _:
                raise RemoteProtocolError(f"{kind.__name__} describes a tensor in no known way")
    if taken != len(buffers):
        raise RemoteProtocolError(f"{kind.__name__} has {len(buffers) - taken} frames more than its header says")
    return found


def _check_shape(kind: type[Message], dtype: str, shape: list[Any]) -> None:
    if dtype not in DTYPE_BYTES:
        raise RemoteProtocolError(
            f"{kind.__name__} has a tensor of dtype {dtype!r:.20}, not one of {', '.join(DTYPE_BYTES)}"
        )
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
        raise RemoteProtocolError(
            f"{kind.__name__} has a tensor whose shape is no list of at most {MAX_DIMENSIONS} sizes"
        )
    # a zero among the sizes must not hide an absurd one from torch
    if math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise RemoteProtocolError(f"{kind.__name__} has a tensor of more than {MAX_ELEMENTS} elements")


def _check_size(kind: type[Message], tensor: TensorFrames) -> None:
    got = sum(map(len, tensor.buffers))
    if got != tensor.num_bytes:
        raise RemoteProtocolError(
            f"{kind.__name__} has a tensor of {got} bytes where its shape needs {tensor.num_bytes}"
        )


def _fit(kind: type[Message], name: str, many: str, tensors: list[TensorFrames]) -> Any:
    if many == "many":
        return tuple(tensors)
    if len(tensors) > 1 or (many == "one" and not tensors):
        raise RemoteProtocolError(f"{kind.__name__}.{name} has {len(tensors)} tensors where one belongs")
    return tensors[0] if tensors else None


def _as_tuple(value: Any) -> tuple[TensorFrames, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _tensor_fields(kind: type[Message]) -> dict[str, str]:
    """Return the fields that are tensors, each "one", "optional" or "many"."""
    amounts: dict[Any, str] = {TensorFrames: "one", TensorFrames | None: "optional", tuple[TensorFrames, ...]: "many"}
    return {name: amounts[hint] for name, hint in typing.get_type_hints(kind).items() if hint in amounts}


def _plain_fields(kind: type[Message]) -> dict[str, Callable[[Any, str], Any]]:
    """Return the fields that travel in the header, each with the function that checks its value."""
    tensors = _tensor_fields(kind)
    return {name: _checker(hint) for name, hint in typing.get_type_hints(kind).items() if name not in tensors}


def _checker(hint: Any) -> Callable[[Any, str], Any]:
    if hint == dict[str, float]:
        return _check_metrics
    if typing.get_origin(hint) is tuple:
        return lambda value, where: _check_tuple(value, where, typing.get_args(hint)[0])
    return lambda value, where: _check_scalar(value, where, hint)


def _check_scalar(value: Any, where: str, wanted: type[Any]) -> Any:
    # type() and not isinstance: True is an int to Python, and no number to us
    if type(value) is not wanted:
        raise RemoteProtocolError(f"{where} is no {wanted.__name__}")
    if wanted is int and not 0 <= value <= _MAX_INT:
        raise RemoteProtocolError(f"{where} is not from 0 to 2**62")
    return value


def _check_tuple(value: Any, where: str, wanted: type[Any]) -> tuple[Any, ...]:
    if type(value) is not list:
        raise RemoteProtocolError(f"{where} is no list")
    return tuple(_check_scalar(item, where, wanted) for item in value)


def _check_metrics(value: Any, where: str) -> dict[str, float]:
    if type(value) is not dict or any(
        type(k) is not str or len(k) > 64 or type(v) is not float for k, v in value.items()
    ):
        raise RemoteProtocolError(f"{where} is no map of short names to floats")
    return value


_TENSOR_FIELDS = {kind: _tensor_fields(kind) for kind in KINDS.values()}
_PLAIN_FIELDS = {kind: _plain_fields(kind) for kind in KINDS.values()}
