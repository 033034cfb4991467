"""Tensors come back bit for bit, whatever their shape, layout and frames; values that are not finite do not."""

import struct
from collections.abc import Sequence

import pytest
import torch
from packed import packed, unpacked
from torch import Tensor

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.messages import TensorFrames
from splitfl.protocol.roles import Role
from splitfl.protocol.tensors import DTYPES, OutOfBounds, Tensors, digest_of, wire_dtype

SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (2, 0, 3)]


def drawn(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.uint8:
        return torch.randint(0, 256, tuple(shape), dtype=dtype, generator=generator)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def is_same(first: Tensor, second: Tensor) -> bool:
    """Compare bits, so that -0.0 is not 0.0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(
        first.contiguous().reshape(-1).view(torch.uint8), second.contiguous().reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("frame_bytes", [3, 16, 1 << 20])
def test_round_trip_is_bit_for_bit(name: str, shape: tuple[int, ...], frame_bytes: int) -> None:
    tensor = drawn(shape, DTYPES[name])
    frames = packed(tensor, frame_bytes)
    assert (frames.dtype, frames.shape) == (name, shape)
    assert frames.num_bytes == tensor.nbytes == sum(map(len, frames.buffers))
    assert all(0 < len(buffer) <= frame_bytes for buffer in frames.buffers)
    assert is_same(unpacked(frames), tensor)


def test_negative_zero_and_the_smallest_numbers_survive() -> None:
    tensor = torch.tensor([-0.0, 0.0, 1e-45, -1e-45, 3.4e38])
    assert is_same(unpacked(packed(tensor, 8)), tensor)


@pytest.mark.parametrize(
    "tensor",
    [drawn((4, 6), torch.float32).T, drawn((4, 6), torch.bfloat16)[:, ::2], torch.ones(1).expand(5)],
    ids=["transposed", "strided", "expanded"],
)
def test_memory_that_is_not_contiguous(tensor: Tensor) -> None:
    assert is_same(unpacked(packed(tensor, 16)), tensor)


def test_buffers_that_are_not_aligned() -> None:
    tensor = drawn((5,), torch.float32)
    raw = memoryview(b"x" + b"".join(packed(tensor, 1 << 20).buffers))[1:]
    got = unpacked(TensorFrames(dtype="f32", shape=(5,), buffers=(raw[:7], raw[7:])))
    assert is_same(got, tensor)


def test_the_tensor_owns_its_memory() -> None:
    buffer = bytearray(struct.pack("<2f", 1.0, 2.0))
    got = unpacked(TensorFrames(dtype="f32", shape=(2,), buffers=(memoryview(buffer),)))
    buffer[:] = bytes(8)
    assert got.tolist() == [1.0, 2.0]


def test_nothing_may_come_in_frames_of_nothing() -> None:
    assert is_same(unpacked(TensorFrames(dtype="f32", shape=(0,), buffers=(b"", b""))), torch.empty(0))


def test_packing_does_not_copy() -> None:
    tensor = torch.zeros(4)
    frames = packed(tensor, 1 << 20)
    tensor[0] = 1.0
    assert bytes(frames.buffers[0][:4]) == struct.pack("<f", 1.0)


def test_a_tensor_that_needs_gradients_is_packed_without_them() -> None:
    assert not unpacked(packed(torch.ones(2, requires_grad=True), 64)).requires_grad


@pytest.mark.parametrize("name", ["f32", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    tensor = drawn((100,), DTYPES[name])
    tensor[57] = bad
    with pytest.raises(RemoteProtocolError, match="not finite"):
        unpacked(packed(tensor, 64))


@pytest.mark.parametrize("name", ["f32", "bf16"])
def test_large_finite_values_are_accepted(name: str) -> None:
    tensor = torch.full((1000,), 3e38).to(DTYPES[name])
    assert is_same(unpacked(packed(tensor, 64)), tensor)


def test_bytes_may_be_anything() -> None:
    assert is_same(unpacked(packed(torch.full((4,), 255, dtype=torch.uint8), 4)), torch.full((4,), 255).byte())


class TestRoles:
    AGREED = Tensors({Role.HIDDEN: "bf16", Role.NORMS: "f32"}, frame_bytes=64, max_rms=10.0)

    def test_a_role_travels_in_the_type_that_was_agreed_on(self) -> None:
        tensor = drawn((3, 4), torch.bfloat16)
        frames = self.AGREED.pack(Role.HIDDEN, tensor)
        assert frames.dtype == "bf16"
        assert is_same(self.AGREED.unpack(Role.HIDDEN, frames), tensor)

    def test_we_send_no_other_type(self) -> None:
        with pytest.raises(LocalProtocolError, match=r"hidden states of type torch\.float32, .* agreed on as bf16"):
            self.AGREED.pack(Role.HIDDEN, drawn((3, 4), torch.float32))

    @pytest.mark.parametrize(("role", "dtype"), [(Role.HIDDEN, torch.float32), (Role.NORMS, torch.bfloat16)])
    def test_we_take_no_other_type(self, role: Role, dtype: torch.dtype) -> None:
        with pytest.raises(RemoteProtocolError, match=f"{role.value} of type .*, which were agreed on as"):
            self.AGREED.unpack(role, packed(drawn((3,), dtype)))

    def test_layers_travel_in_types_of_their_own(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            layer = drawn((5,), dtype)
            assert is_same(self.AGREED.unpack(Role.LAYER, self.AGREED.pack(Role.LAYER, layer)), layer)

    @pytest.mark.parametrize("role", Role)
    def test_no_role_takes_more_than_the_bound(self, role: Role) -> None:
        dtype = torch.bfloat16 if role is Role.HIDDEN else torch.float32
        with pytest.raises(OutOfBounds, match="root mean square is 16, more than max_rms = 10"):
            self.AGREED.unpack(role, packed(torch.full((7,), 16.0, dtype=dtype)))


def test_names_of_types() -> None:
    assert [wire_dtype(dtype) for dtype in DTYPES.values()] == ["f32", "bf16", "u8"]


class TestDigest:
    def test_is_equal_for_equal_values(self) -> None:
        tensors = [drawn((3, 4), torch.float32), drawn((2,), torch.bfloat16)]
        copies = [tensor.clone().T.contiguous().T for tensor in tensors[:1]] + [tensors[1].clone()]
        assert digest_of(tensors) == digest_of(copies)

    def test_differs_by_one_bit(self) -> None:
        tensor = drawn((3, 4), torch.float32)
        other = tensor.clone()
        other.view(-1).view(torch.uint8)[17] ^= 1
        assert digest_of([tensor]) != digest_of([other])

    def test_differs_by_order(self) -> None:
        first, second = drawn((2,), torch.float32, 1), drawn((2,), torch.float32, 2)
        assert digest_of([first, second]) != digest_of([second, first])

    def test_of_nothing_is_that_of_no_bytes(self) -> None:
        assert digest_of([]) == digest_of([torch.empty(0)])
