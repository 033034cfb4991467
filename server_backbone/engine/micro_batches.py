"""Micro-batches: frames become tensors, the blocks compute, and the answer is frames again."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from server_backbone.compute.blocks_worker import BlocksWorker, MicroBatch, Positions
from server_backbone.compute.mishaps import Mishap, done_for
from server_backbone.compute.queue import Doers
from server_backbone.engine import work
from server_backbone.engine.work import Work
from server_backbone.kinds import ServerParts
from splitfl.config.trees import RunConfig
from splitfl.durability.crash import crash_point
from splitfl.errors import ModelError, RemoteProtocolError
from splitfl.models.layout import Layout
from splitfl.protocol.messages import Backward, BackwardDone, Declined, Decode, Forward, ForwardDone, TensorFrames
from splitfl.protocol.roles import Role
from splitfl.protocol.tensors import Tensors

T = TypeVar("T")


class MicroBatches:
    """What clients have the blocks compute; what fails for one is nobody else's affair."""

    def __init__(self, run: RunConfig, kind: ServerParts, worker: BlocksWorker, tensors: Tensors) -> None:
        self._run = run
        self._kind = kind
        self._worker = worker
        self._tensors = tensors

    def doers(self) -> Doers[Work]:
        """Return who does what clients have computed, and who frees it."""
        return {
            work.Run: self.run,
            work.Generate: self.generate,
            work.FreeCache: lambda asked: self._worker.generations.end(asked.client_id, asked.cache_id),
            work.FreeCaches: lambda asked: self._worker.generations.end(asked.client_id),
            work.Discard: lambda asked: self._worker.discard(asked.client_id),
        }

    def run(self, asked: work.Run) -> ForwardDone | BackwardDone | None:
        """Run a micro-batch forward and keep its graph, or backward and free it; None where nobody waits any more."""
        client_id = asked.ticket.client_id
        if asked.ticket.is_void:
            return None
        match asked.message:
            case Forward(step=0) as message:
                return self._for(client_id, message.hidden_BSD, partial(self._evaluate, client_id, message))
            case Forward() as message:
                return self._for(client_id, message.hidden_BSD, partial(self._forward, client_id, message))
            case Backward() as message:
                return self._for(client_id, message.gradient_BSD, partial(self._backward, client_id, message))

    def generate(self, asked: work.Generate) -> ForwardDone | Declined | None:
        """Run new positions of a generation, or decline; None where nobody waits any more."""
        client_id, message = asked.ticket.client_id, asked.message
        if asked.ticket.is_void:
            return None
        if asked.objection:
            return Declined(request_id=message.request_id, reason=asked.objection)
        return self._for(client_id, message.hidden_BSD, partial(self._decode, client_id, message))

    def _for(self, client_id: str, tensor: TensorFrames, compute: Callable[[], T]) -> T:
        """Compute for one client; raise `Mishap`, with all that it had under way freed, where torch could not."""
        rows, length, _ = tensor.shape
        try:
            return done_for(compute, f"the server could not compute {rows} x {length} tokens of {client_id}")
        except Mishap:
            self._worker.discard(client_id)
            self._worker.generations.end(client_id)
            raise

    def _evaluate(self, client_id: str, message: Forward) -> ForwardDone:
        hidden_BSD = self._worker.evaluate(client_id, self._micro_batch(message))
        return ForwardDone(request_id=message.request_id, hidden_BSD=self._tensors.pack(Role.HIDDEN, hidden_BSD))

    def _decode(self, client_id: str, message: Decode) -> ForwardDone | Declined:
        try:
            got = self._worker.generations.decode(client_id, message.cache_id, self._positions(message))
        except ModelError as error:
            got = str(error)
        if isinstance(got, str):
            return Declined(request_id=message.request_id, reason=got)
        return ForwardDone(request_id=message.request_id, hidden_BSD=self._tensors.pack(Role.NEW_POSITIONS, got))

    def _forward(self, client_id: str, message: Forward) -> ForwardDone:
        crash_point("forward")
        hidden_BSD = self._worker.forward(client_id, self._micro_batch(message))
        return ForwardDone(request_id=message.request_id, hidden_BSD=self._tensors.pack(Role.HIDDEN, hidden_BSD))

    def _backward(self, client_id: str, message: Backward) -> BackwardDone:
        gradient_BSD = self._tensors.unpack(Role.GRADIENT, message.gradient_BSD)
        got = self._worker.backward(client_id, message.request_id, gradient_BSD)
        return BackwardDone(
            request_id=message.request_id,
            gradient_BSD=None if got.gradient_BSD is None else self._tensors.pack(Role.GRADIENT, got.gradient_BSD),
            norms_Q=self._tensors.pack(Role.NORMS, got.norms_Q) if self._kind.tells_norms else None,
        )

    def _micro_batch(self, message: Forward) -> MicroBatch:
        self._check_adapters(message)
        layout = Layout(
            lengths_B=message.lengths_B, left_padded=message.left_padded, example_lengths=message.example_lengths
        )
        return MicroBatch(
            hidden_BSD=self._tensors.unpack(Role.HIDDEN, message.hidden_BSD),
            layout=layout,
            request_id=message.request_id,
            step=message.step,
            micro_batch=message.micro_batch,
            adapters_off=message.adapters_off,
        )

    def _positions(self, message: Decode) -> Positions:
        self._check_adapters(message)
        return Positions(
            hidden_BSD=self._tensors.unpack(Role.NEW_POSITIONS, message.hidden_BSD),
            lengths_B=message.lengths_B,
            beams_B=message.beams_B,
            adapters_off=message.adapters_off,
        )

    def _check_adapters(self, message: Forward | Decode) -> None:
        if message.adapters_off and self._run.backbone_trains and self._run.train.backbone == "full":
            raise RemoteProtocolError("adapters_off where the backbone trains in full: it has no adapters to turn off")
