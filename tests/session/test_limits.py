"""The largest message that is legal is within the announced bounds, on every kind of connection."""

import pytest
import torch
from packed import packed
from sample_messages import forward

from splitfl.config.operation import LinkSection
from splitfl.protocol import codec
from splitfl.protocol.messages import Backward, BackwardDone, Buffer, Chunk, Merged, Message, TensorFrames, Upload
from splitfl.session.limits import limits_of
from splitfl.session.terms import MAX_PACKED_EXAMPLES, Terms
from splitfl.transport.framing import CHECKSUM_BYTES, Framing

FRAME_BYTES = 1 << 12
LINK = LinkSection(frame_bytes=FRAME_BYTES)
SHAPES = ((7, 900), (3,), (1024,), (1025,), (2, 512))


def terms(*, has_controls: bool) -> Terms:
    return Terms(
        hidden_size=33,
        dtype="f32",
        max_seq_length=64,
        max_batch_size=4,
        max_in_flight=2,
        max_packed_examples=0,
        micro_batches=1,
        needs_backward=True,
        num_trainable=len(SHAPES),
        layer_shapes=SHAPES,
        layer_dtypes=("f32",) * len(SHAPES),
        has_controls=has_controls,
        num_rounds=3,
        local_steps=2,
    )


def tensor(*shape: int) -> TensorFrames:
    return packed(torch.zeros(shape), FRAME_BYTES)


def largest(*, has_controls: bool) -> list[Message]:
    layers = tuple(tensor(*shape) for shape in SHAPES)
    merged = layers * 2 if has_controls else layers
    piece = TensorFrames(dtype="u8", shape=(FRAME_BYTES,), buffers=(bytes(FRAME_BYTES),))
    return [
        Backward(request_id=1, gradient_BSD=tensor(4, 64, 33)),
        BackwardDone(request_id=1, gradient_BSD=tensor(4, 64, 33), norms_Q=tensor(2000)),
        Upload(round_number=1, num_examples=1, num_tokens=1, layers=layers),
        Merged(round_number=1, accepted=True, reason="", is_last=False, counted=True, layers=merged),
        Chunk(name="tokenizer.json", offset=0, content=piece),
    ]


@pytest.mark.parametrize("has_controls", [False, True])
@pytest.mark.parametrize("has_keys", [False, True])
def test_the_largest_messages_are_legal(has_keys: bool, has_controls: bool) -> None:
    limits = limits_of(terms(has_controls=has_controls), LINK, clients=1)
    framing = Framing.of("tcp://127.0.0.1:1", has_keys=has_keys)
    most = framing.most_bytes(limits.message_bytes, limits.message_frames)
    for message in largest(has_controls=has_controls):
        frames: list[Buffer] = codec.encode(message)
        sealed = [*frames, bytes(CHECKSUM_BYTES)] if framing.has_checksum else frames
        assert sum(map(len, frames)) <= limits.message_bytes
        assert len(frames) <= limits.message_frames
        assert framing.num_bytes(sealed) <= most


def test_framing_is_counted_frame_by_frame() -> None:
    """113 MB in frames of 256 KiB take 4 kB of framing without keys, and in frames of 4 KiB with keys 1.2 MB."""
    frames = [bytes(FRAME_BYTES)] * 1000
    plain, keys = (Framing.of("tcp://127.0.0.1:1", has_keys=has_keys) for has_keys in (False, True))
    assert plain.num_bytes(frames) == 1000 * (FRAME_BYTES + 9)
    assert keys.num_bytes(frames) == 1000 * (FRAME_BYTES + 9 + 33)
    assert keys.most_bytes(1000 * FRAME_BYTES, 1000) == keys.num_bytes(frames)


def test_the_lengths_of_as_many_packed_examples_as_may_be_fit_into_a_header() -> None:
    lengths = (300,) * MAX_PACKED_EXAMPLES
    rows = (300 * len(lengths) // 512,) * 512
    header = codec.encode(forward(1, 0, example_lengths=lengths, lengths_B=rows))[0]
    assert len(header) < codec.MAX_HEADER_BYTES
