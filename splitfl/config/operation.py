"""How a run is operated: settings that may change between two starts of one run, and whose change is logged."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from splitfl.config.section import Section, SettingClass


class Operation(Section):
    """A setting that a section of this kind declares may change between two starts of a run."""

    decides: ClassVar[SettingClass | None] = SettingClass.OPERATION


class ModelOperation(Operation):
    """Where the model lies."""

    model_name_or_path: str = ""
    """A directory with `config.json`, tokenizer and safetensors, a .gguf file (converted once), or a Hugging Face hub
    id. Only the server reads it; where it lies and what it is called may change, what it holds may not."""


class FederationOperation(Operation):
    """How many rounds there are, and who is waited for how long."""

    num_rounds: int = Field(3, ge=0)
    """Rounds in the run; each ends with a merge of the client-side layers (with FedBuff it is merges that are counted).
    0 means no rounds and no merges: clients are own-loop clients (`client_edge.connect`), and the server runs until it
    is stopped."""

    per_device_eval_batch_size: int = Field(8, ge=1)
    """Examples in one batch of an evaluation."""

    min_train_clients: int = Field(1, ge=1)
    """Fewest clients whose layers make a merge; below it the old layers stay."""

    min_available_clients: int = Field(1, ge=1)
    """Clients that must be connected and ready before a round opens."""

    wait_timeout: float = Field(600.0, gt=0)
    """Seconds to wait for `min_available_clients` before the run is given up."""

    round_timeout: float = Field(3600.0, gt=0)
    """Seconds after which a round closes with the clients that are done; `partial_work` says what becomes of the
    others' work."""

    step_timeout: float = Field(120.0, gt=0)
    """Seconds after which a step goes on without a client that has not finished it, and a round without one whose
    connection is lost."""

    max_missed_steps: int = Field(3, ge=1)
    """Steps in a row that went on without a client after which it sits out: nobody waits for it until it begins a step
    again. A round, too, waits no longer than so many times `step_timeout` for a client that finishes nothing."""


class StrategyOperation(Operation):
    """How far a merge trusts an upload."""

    max_update: float = Field(10.0, ge=0)
    """How far the layers that a client uploads may have moved. Each tensor may move by its own size, and this many
    times as far as the round's steps reach at the run's learning rate. An upload that has moved further is refused; 0
    means no bound (docs/strategies.md)."""


class LinkSection(Operation):
    """The wire between one client and the server."""

    max_in_flight: int = Field(2, ge=1, le=64)
    """Micro-batches a client may have under way at once."""

    frame_bytes: int = Field(1 << 18, ge=1 << 12, le=1 << 26)
    """Largest frame a tensor is cut into."""

    heartbeat_interval: float = Field(2.0, gt=0)
    """Seconds between two heartbeats on the control connection."""

    heartbeat_timeout: float = Field(8.0, gt=0)
    """Seconds of silence on the control connection after which the peer counts as gone."""

    slowest_link_bytes_per_second: float = Field(250_000.0, gt=0)
    """The slowest client link to allow for (default 2 Mbit/s). A frame must pass it in less than half the heartbeat
    timeout, and a message that is slower than this is taken for lost."""

    max_rms: float = Field(1e6, gt=0)
    """Largest root mean square of a tensor's values that either side takes from the other; larger ones count as poison,
    as NaN and infinity do."""

    max_caches: int = Field(2, ge=1)
    """Generations that one client may have under way at once, each with a key-value cache on the server."""

    max_cache_tokens: int = Field(16384, ge=1)
    """Tokens, rows times positions, that all caches of one client may hold on the server."""

    cache_timeout: float = Field(300.0, gt=0)
    """Seconds without a new token after which the server frees a cache."""

    @model_validator(mode="after")
    def _a_heartbeat_passes(self) -> Self:
        if self.heartbeat_interval * 2 > self.heartbeat_timeout:
            raise ValueError(
                f"heartbeat_timeout ({self.heartbeat_timeout} s) must be at least twice heartbeat_interval"
                f" ({self.heartbeat_interval} s)"
            )
        seconds = self.frame_bytes / self.slowest_link_bytes_per_second
        if seconds >= self.heartbeat_timeout / 2:
            raise ValueError(
                f"a frame of frame_bytes ({self.frame_bytes}) takes {seconds:.1f} s on the slowest link, which must"
                f" stay below half of heartbeat_timeout ({self.heartbeat_timeout} s)"
            )
        return self


class StorageOperation(Operation):
    """How often what is written is forced to the disk, and how much is kept."""

    fsync: Literal["always", "interval", "never"] = "always"
    """When writes are forced through to the disk: before every acknowledgement, every `fsync_interval`, or when the
    system likes. The last two survive a crash of the process but not a power failure."""

    fsync_interval: float = Field(1.0, gt=0)
    """Seconds between two forced writes with `fsync = "interval"`."""

    snapshot_steps: int = Field(50, ge=1)
    """Commits after which a snapshot is taken between two merges; bounds the log's size and the time to recover."""

    keep_snapshots: int = Field(2, ge=0)
    """Generations of snapshots that are kept, with the log since each. It takes 2 for a damaged one to have a
    predecessor; 0 keeps all, so that `splitfl replay` can begin at the first step."""

    keep_named: int = Field(8, ge=1)
    """Snapshots of the backbone that checkpoints of own-loop clients name (`federation.num_rounds = 0`); the oldest
    goes when another is kept."""

    @model_validator(mode="after")
    def _has_a_predecessor(self) -> Self:
        if self.keep_snapshots == 1:
            raise ValueError("keep_snapshots must be 2 or more, or 0 for all: a damaged snapshot needs a predecessor")
        return self
