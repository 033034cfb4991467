"""What a server takes from one client at most, and what that can cost it: docs/limits.md has the formula."""

from dataclasses import asdict, dataclass

from splitfl.config.operation import LinkSection
from splitfl.protocol.codec import MAX_HEADER_BYTES
from splitfl.session.terms import Terms

# Violations after which a client is kept out.
MAX_STRIKES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of one session, announced in the welcome and held on both sides."""

    header_bytes: int
    frame_bytes: int
    message_bytes: int
    """All frames of one message together."""
    message_frames: int
    """Frames of one message, its header included."""
    messages_queued: int
    """Messages of one client that wait in the server's socket before it is made to wait."""
    micro_batches_in_flight: int
    """Graphs that one client may have on the server."""
    clients: int
    caches: int
    """Key-value caches of one client."""
    cache_tokens: int
    """Rows times positions in all of them."""
    packed_examples: int
    """Examples that the rows of one micro-batch may be packed from; 0 where each row is one example."""
    cache_seconds: float
    """How long a cache is kept without a new token."""
    strikes: int

    @property
    def bytes_per_client(self) -> int:
        """Most bytes of messages that one client can have the server hold, graphs apart."""
        return self.message_bytes * (self.messages_queued + 2 * self.micro_batches_in_flight + 1)

    def announced(self) -> dict[str, float]:
        """Write them as the welcome carries them."""
        return {name: float(value) for name, value in asdict(self).items()} | {
            "bytes_per_client": float(self.bytes_per_client)
        }


def limits_of(terms: Terms, link: LinkSection, *, clients: int) -> Limits:
    """Return the limits that follow from a run's terms: the largest legal message is activations or all layers."""
    return Limits(
        header_bytes=MAX_HEADER_BYTES,
        frame_bytes=link.frame_bytes,
        message_bytes=MAX_HEADER_BYTES + max(terms.activation_bytes, terms.merged_bytes, link.frame_bytes),
        message_frames=_most_frames(terms, link.frame_bytes),
        messages_queued=messages_queued(link),
        micro_batches_in_flight=terms.max_in_flight,
        clients=clients,
        caches=link.max_caches,
        cache_tokens=link.max_cache_tokens,
        packed_examples=terms.max_packed_examples,
        cache_seconds=link.cache_timeout,
        strikes=MAX_STRIKES,
    )


def messages_queued(link: LinkSection) -> int:
    """Return how many messages of one client may wait, also needed before the terms are known.

    Both directions of each micro-batch, a commit or upload, and what a reconnection says.
    """
    return 2 * link.max_in_flight + 6


def _most_frames(terms: Terms, frame_bytes: int) -> int:
    """Return the frames of the largest message: a header, tensors each cut anew, and norms of gradients."""
    beside = 1 + -(-MAX_HEADER_BYTES // frame_bytes)
    activations = -(-terms.activation_bytes // frame_bytes)
    layers = sum(-(-num_bytes // frame_bytes) for num_bytes in terms.merged_sizes)
    return beside + max(activations, layers, 1)
