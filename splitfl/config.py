"""The settings of a run: one typed tree, read from TOML, with `--set section.key=value` laid over it.

The server's tree (`ServerConfig`) is the run's: what both roles must agree on (`RunConfig`) travels to the clients in
the welcome, so nothing has to be kept equal by hand on two machines. A client's own tree (`ClientConfig`) holds only
what is its own: where the server is, who it is, and where its text lies.
"""

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeGuard, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticKnownError

from splitfl.errors import ConfigError

T = TypeVar("T")


class SettingClass(Enum):
    """What a run's setting decides, and so what a change of it between two starts means."""

    IDENTITY = "identity"
    EXPOSURE = "exposure"
    OPERATION = "operation"


# Around the type of every setting of a run, and of no other: `num_rounds: Operation[int] = Field(3, ge=0)`.
Identity: TypeAlias = Annotated[T, SettingClass.IDENTITY]
"""It decides the weights: another value is another run."""
Exposure: TypeAlias = Annotated[T, SettingClass.EXPOSURE]
"""It decides what leaves a client: another value needs the clients' consent. `Identity[Exposure[...]]` is both."""
Operation: TypeAlias = Annotated[T, SettingClass.OPERATION]
"""It decides neither: it may change between two starts of one run, and is logged."""

Part = Literal["lora", "full", "none"]

StrategyName = Literal[
    "FedAvg",
    "FedProx",
    "SCAFFOLD",
    "FedAvgM",
    "FedBuff",
    "FedAdagrad",
    "FedAdam",
    "FedYogi",
    "FedMedian",
    "FedTrimmedAvg",
    "Krum",
    "MultiKrum",
    "NormClippedMean",
]

MeasureName = Literal[
    "eval_loss",
    "perplexity",
    "token_accuracy",
    "exact_match",
    "rouge_l",
    "accuracy",
    "macro_f1",
]

# Measured only where `evaluation.measures` has them.
OPTIONAL_MEASURES = ("exact_match", "rouge_l", "accuracy", "macro_f1")

# TOML has no null: an empty string says "not set" for a path as it does for a name.
OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]

# A name that is a safe file name on every system, in a log line and in a header.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

SHA256_PATTERN = r"^[0-9a-f]{64}$"

# What a further held-out text may be called: in a log, on a terminal, in a page and in a header; and how many.
ALSO_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,57}$"
MAX_ALSO = 16

# A machine and a port, an IPv6 address in brackets.
PROXY_PATTERN = r"^(\[[0-9A-Fa-f:.]+\]|[^\s:/]+):[0-9]{1,5}$"


class Section(BaseModel):
    """A frozen group of settings; the sentence under each field is its documentation (docs/configuration.md)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _guesses_nothing(cls, value: object, info: ValidationInfo) -> object:
        """Take no `true`, "3" or 3.0 for a whole number; pydantic's own strict mode refuses lists and paths too."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        if wanted is int and type(value) is not int:
            raise PydanticKnownError("int_type")
        if wanted is float and type(value) not in (int, float):
            raise PydanticKnownError("float_type")
        if wanted is bool and type(value) is not bool:
            raise PydanticKnownError("bool_type")
        return value


class ModelSection(Section):
    """Which model is trained and where it is cut."""

    model_name_or_path: Operation[str] = ""
    """A directory with `config.json`, tokenizer and safetensors, a .gguf file (converted once), or a Hugging Face hub
    id. Only the server reads it; where it lies and what it is called may change, what it holds may not."""

    checkpoint_sha256: Identity[str] = Field("", pattern=r"^$|" + SHA256_PATTERN)
    """SHA-256 of what the model holds (weights, config, tokenizer; docs/loading.md), which the server finds out when it
    starts and writes into the run's settings; set it, and another model is refused."""

    bottom_layers: Identity[Exposure[int]] = Field(1, ge=0)
    """Blocks below the first cut, on the client, after the embedding."""

    top_layers: Identity[Exposure[int]] = Field(1, ge=0)
    """Blocks above the last cut, on the client, before the final norm and the LM head."""

    dtype: Identity[Literal["float32", "bfloat16"]] = "float32"
    """Type of the weights on both sides and of the activations on the wire."""

    attn_implementation: Identity[Literal["auto", "sdpa", "eager"]] = "auto"
    """Attention code of transformers, the same on both sides; "auto" is what transformers picks for the family."""


class TrainSection(Section):
    """What trains, per part of the model."""

    bottom: Identity[Exposure[Part]] = "lora"
    """The client's blocks below the first cut: adapters, all weights, or nothing."""

    top: Identity[Exposure[Part]] = "lora"
    """The client's blocks above the last cut."""

    backbone: Identity[Exposure[Part]] = "lora"
    """The server's blocks; `server_mode = "frozen"` overrides it with "none"."""

    backbone_layers: Identity[int] = Field(0, ge=0)
    """How many of the server's blocks train, counted from the last; 0 means all of them."""

    norm_head: Identity[Exposure[bool]] = False
    """Whether the final norm and the LM head train; a head tied to the embedding trains only if `embeddings` does."""

    embeddings: Identity[Exposure[bool]] = False
    """Whether the token (and position) embeddings train; rows that change in an upload tell which tokens were used."""

    loss: Identity[Literal["chunked", "plain"]] = "chunked"
    """`chunked`: no client ever holds the logits of a batch (within 1e-6 of plain in float32); `plain`: the library's
    own loss, for which split training equals unsplit training bit for bit."""


class LoraSection(Section):
    """Low-rank adapters (LoRA) for every part that says "lora"."""

    r: Identity[int] = Field(8, ge=1, le=4096)
    """Rank of the adapters."""

    alpha: Identity[float] = Field(16.0, gt=0, le=1e6)
    """Scale of the adapters: their output is multiplied by alpha / r."""

    dropout: Identity[float] = Field(0.0, ge=0, lt=1)
    """Dropout before each adapter while training."""

    target_modules: Identity[tuple[str, ...]] = ()
    """Names of the linear layers in a block that get an adapter; empty means peft's choice for the model's family."""


class OptimizerSection(Section):
    """The optimizer and its schedule, the same on both sides."""

    optim: Identity[Literal["adamw_torch", "sgd"]] = "adamw_torch"
    """AdamW, or plain SGD without momentum."""

    learning_rate: Identity[float] = Field(2e-4, gt=0)
    """Peak learning rate of both sides."""

    weight_decay: Identity[float] = Field(0.0, ge=0)
    """Decay of matrices; vectors (norms and biases) never decay."""

    adam_beta1: Identity[float] = Field(0.9, ge=0, lt=1)
    """AdamW's first moment."""

    adam_beta2: Identity[float] = Field(0.999, ge=0, lt=1)
    """AdamW's second moment."""

    adam_epsilon: Identity[float] = Field(1e-8, gt=0)
    """AdamW's epsilon."""

    max_grad_norm: Identity[float] = Field(1.0, ge=0)
    """Gradients are clipped to this global norm over both sides; 0 means no clipping."""

    lr_scheduler_type: Identity[Literal["constant", "constant_with_warmup", "linear", "cosine"]] = "linear"
    """Schedule over `num_training_steps`, as in transformers."""

    num_training_steps: Identity[int] = Field(0, ge=0)
    """Steps of each client over which the schedule runs; after them a linear or cosine one stays at 0. 0 means the
    `num_rounds * local_steps` that the run has when it begins: a run that is prolonged keeps what it began with."""

    warmup_steps: Identity[int] = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""

    backbone_lr: Identity[float] = Field(0.0, ge=0)
    """Learning rate of the server's blocks where clients train in loops of their own (`federation.num_rounds = 0`); 0
    follows the client's."""

    @property
    def ends_at_zero(self) -> bool:
        """Whether the learning rate is 0 from the schedule's last step on."""
        return self.lr_scheduler_type in ("linear", "cosine")


class FederationSection(Section):
    """Rounds, who takes part in them, and how the backbone and the merges treat several clients."""

    server_mode: Identity[Exposure[Literal["shared", "sequential", "per_client", "frozen"]]] = "shared"
    """`shared`: one backbone step from all clients' gradients; `sequential`: a step per client, one client at a time;
    `per_client`: each client trains a copy of the backbone's adapters (or weights) of its own, merged with the round;
    `frozen`: the backbone does not learn. docs/server-modes.md compares them."""

    num_rounds: Operation[int] = Field(3, ge=0)
    """Rounds in the run; each ends with a merge of the client-side layers (with FedBuff it is merges that are counted).
    0 means no rounds and no merges: each client trains in a loop of its own (`client_edge.connect`), and the server
    runs until it is stopped."""

    local_steps: Identity[int] = Field(10, ge=1)
    """Optimizer steps of each client per round."""

    per_device_train_batch_size: Identity[int] = Field(4, ge=1)
    """Examples in one micro-batch; rows, each of several examples, where `text.packing` is on."""

    gradient_accumulation_steps: Identity[int] = Field(2, ge=1)
    """Micro-batches in one step; with two or more, client and server compute at the same time."""

    per_device_eval_batch_size: Operation[int] = Field(8, ge=1)
    """Examples in one batch of an evaluation."""

    strategy: Identity[StrategyName] = "FedAvg"
    """How the client-side layers are merged; `[strategy]` has its options, docs/strategies.md the formulas."""

    weight_by: Identity[Literal["num_examples", "num_tokens", "uniform"]] = "num_examples"
    """What weighs a client in a merge: its training examples, its label tokens of the round, or nothing."""

    fraction_train: Identity[float] = Field(1.0, gt=0, le=1)
    """Share of the connected clients that train in a round, drawn with the run's seed."""

    min_train_clients: Operation[int] = Field(1, ge=1)
    """Fewest clients whose layers make a merge; below it the old layers stay."""

    min_available_clients: Operation[int] = Field(1, ge=1)
    """Clients that must be connected and ready before a round opens."""

    optimizer_state: Identity[Literal["keep", "reset"]] = "keep"
    """What becomes of a client's optimizer state when merged layers arrive."""

    client_max_grad_norm: Identity[float] = Field(10.0, ge=0)
    """Where several clients share a step, the backbone's gradient from each of them is clipped to this norm before they
    are added up, so that none outweighs the others; 0 means no such clipping."""

    evaluate: Exposure[Literal["ends", "rounds"]] = "ends"
    """Evaluate each client's held-out text before and after the run, or after every round as well."""

    metric_for_best_model: Identity[MeasureName] = "eval_loss"
    """The measure by which rounds are compared, over all clients' held-out text (docs/evaluation.md); its name decides
    whether more is better."""

    early_stopping_patience: Identity[int] = Field(0, ge=0)
    """Rounds in a row without improvement after which the run ends, as in transformers; 0 never ends it early. Needs
    `evaluate = "rounds"`."""

    early_stopping_threshold: Identity[float] = Field(0.0, ge=0)
    """How much better than the best round so far a round must be to count as an improvement."""

    load_best_model_at_end: Identity[bool] = False
    """Whether the run ends with the layers and the backbone of its best round, and not with those of its last: on all
    clients and in the exported model. Needs `evaluate = "rounds"`."""

    wait_timeout: Operation[float] = Field(600.0, gt=0)
    """Seconds to wait for `min_available_clients` before the run is given up."""

    round_timeout: Operation[float] = Field(3600.0, gt=0)
    """Seconds after which a round closes with the clients that are done; `partial_work` says what becomes of the
    others' work."""

    partial_work: Identity[Literal["drop", "accept"]] = "drop"
    """`drop`: clients still at work at `round_timeout` are left out of the merge; `accept`: they have `step_timeout`
    more to upload what their finished steps have made, and a client's `num_examples` count by the share of the round's
    steps that it has finished."""

    step_timeout: Operation[float] = Field(120.0, gt=0)
    """Seconds after which a step goes on without a client that has not finished it, and a round without one whose
    connection is lost."""

    max_missed_steps: Operation[int] = Field(3, ge=1)
    """Steps in a row that went on without a client after which it sits out: nobody waits for it until it begins a step
    again. A round, too, waits no longer than so many times `step_timeout` for a client that finishes nothing."""

    @model_validator(mode="after")
    def _clients_add_up(self) -> Self:
        if self.min_train_clients > self.min_available_clients:
            raise ValueError(
                f"min_train_clients ({self.min_train_clients}) must not exceed min_available_clients"
                f" ({self.min_available_clients})"
            )
        return self

    @property
    def compares_rounds(self) -> bool:
        """Whether what happens next hangs on how good each round was."""
        return self.early_stopping_patience > 0 or self.load_best_model_at_end

    @model_validator(mode="after")
    def _compares_what_is_evaluated(self) -> Self:
        if self.compares_rounds and (self.evaluate != "rounds" or not self.num_rounds):
            asks = "early_stopping_patience" if self.early_stopping_patience else "load_best_model_at_end"
            raise ValueError(
                f'{asks} compares rounds, and no round is evaluated: set federation.evaluate to "rounds"'
                + (" and num_rounds to 1 or more" if not self.num_rounds else "")
            )
        if self.early_stopping_threshold and not self.early_stopping_patience:
            raise ValueError(
                f"early_stopping_threshold = {self.early_stopping_threshold:g} means nothing without"
                " early_stopping_patience: set that to the rounds to wait for an improvement"
            )
        return self

    @model_validator(mode="after")
    def _shares_steps_only_in_rounds(self) -> Self:
        if self.num_rounds == 0 and self.server_mode == "shared":
            raise ValueError(
                "num_rounds = 0 lets each client train in a loop of its own, so there is no step that all share: set"
                ' server_mode to "sequential", "per_client" or "frozen"'
            )
        return self


class StrategySection(Section):
    """Options of `federation.strategy`, spelt as in Flower; one that the chosen strategy does not use is refused."""

    model_config = ConfigDict(allow_inf_nan=False)

    USED_BY: ClassVar[Mapping[str, frozenset[StrategyName]]] = {
        "proximal_mu": frozenset({"FedProx"}),
        "server_learning_rate": frozenset({"FedAvgM", "FedBuff", "SCAFFOLD"}),
        "server_momentum": frozenset({"FedAvgM"}),
        "buffer_size": frozenset({"FedBuff"}),
        "max_staleness": frozenset({"FedBuff"}),
        "eta": frozenset({"FedAdagrad", "FedAdam", "FedYogi"}),
        "beta_1": frozenset({"FedAdam", "FedYogi"}),
        "beta_2": frozenset({"FedAdam", "FedYogi"}),
        "tau": frozenset({"FedAdagrad", "FedAdam", "FedYogi"}),
        "beta": frozenset({"FedTrimmedAvg"}),
        "num_malicious_clients": frozenset({"Krum", "MultiKrum"}),
        "num_clients_to_keep": frozenset({"MultiKrum"}),
        "clipping_norm": frozenset({"NormClippedMean"}),
        # the others know no weights, or only equal ones
        "max_client_weight": frozenset(get_args(StrategyName)) - {"FedMedian", "FedTrimmedAvg", "Krum", "SCAFFOLD"},
        "max_update": frozenset(get_args(StrategyName)),
    }

    proximal_mu: Identity[float] = Field(0.01, ge=0)
    """FedProx: how strongly a client's layers are pulled towards those of the last merge; 0 is FedAvg."""

    server_learning_rate: Identity[float] = Field(1.0, gt=0)
    """FedAvgM, FedBuff, SCAFFOLD: scale of the server's step."""

    server_momentum: Identity[float] = Field(0.9, ge=0, lt=1)
    """FedAvgM: share of the last step that is kept; 0 and `server_learning_rate = 1` is FedAvg."""

    buffer_size: Identity[int] = Field(2, ge=1)
    """FedBuff: uploads in a merge (K), whoever they come from; `federation.num_rounds` counts these merges."""

    max_staleness: Identity[int] = Field(0, ge=0)
    """FedBuff: an upload begun more merges ago than this is dropped; 0 means that none is."""

    eta: Identity[float] = Field(0.1, gt=0)
    """FedAdagrad, FedAdam, FedYogi: the server's learning rate, about the largest change of a value in a merge."""

    beta_1: Identity[float] = Field(0.9, ge=0, lt=1)
    """FedAdam, FedYogi: the first moment's decay."""

    beta_2: Identity[float] = Field(0.99, ge=0, lt=1)
    """FedAdam, FedYogi: the second moment's decay."""

    tau: Identity[float] = Field(1e-3, gt=0)
    """FedAdagrad, FedAdam, FedYogi: added to the root of the second moment; a change far below it counts little."""

    beta: Identity[float] = Field(0.2, ge=0, lt=0.5)
    """FedTrimmedAvg: share of the clients, rounded down, left out at each end of every value."""

    num_malicious_clients: Identity[int] = Field(0, ge=0)
    """Krum, MultiKrum: how many clients may be up to no good (f); a merge needs 2 f + 3 clients."""

    num_clients_to_keep: Identity[int] = Field(0, ge=0)
    """MultiKrum: how many of the best clients are averaged; 0 means all but `num_malicious_clients`."""

    clipping_norm: Identity[float] = Field(1.0, gt=0)
    """NormClippedMean: largest norm of a client's change since the last merge, over all its merged layers."""

    max_client_weight: Identity[float] = Field(0.5, gt=0, le=1)
    """Largest share of a merge that one client may be, whatever it says of its examples, where a merge has three
    clients or more; with fewer than 1 / `max_client_weight` all count alike, 1 means no bound (docs/strategies.md)."""

    max_update: Operation[float] = Field(10.0, ge=0)
    """How far the layers that a client uploads may have moved: each tensor by its own size, and this many times as far
    as the round's steps reach at the run's learning rate; what has moved further is refused, 0 means no bound
    (docs/strategies.md)."""

    def unused_by(self, strategy: StrategyName) -> list[str]:
        """Name the options that differ from their default and that the strategy does not use."""
        return [
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default and strategy not in self.USED_BY[name]
        ]


class MergeSection(Section):
    """Which of the client-side layers are everyone's."""

    parts: Identity[Exposure[tuple[Literal["bottom", "top"], ...]]] = ("bottom", "top")
    """What is uploaded and merged; a part that is not named stays each client's own and is not uploaded (personal
    heads), and [] merges nothing. A head tied to the embedding is the bottom's."""


class TextSection(Section):
    """How every client turns text into tokens."""

    max_seq_length: Identity[Exposure[int]] = Field(512, ge=2)
    """Tokens after which an example is cut off; the client reports how many were."""

    append_eos: Identity[bool] = True
    """Whether each example ends with the tokenizer's end-of-sequence token."""

    packing: Identity[Exposure[bool]] = False
    """Whether training examples share rows of up to `max_seq_length` tokens, without attention across them;
    `federation.per_device_train_batch_size` then counts rows, and the server is told where each example ends."""

    train_sampling_strategy: Identity[Literal["random", "group_by_length"]] = "random"
    """Which examples share a micro-batch, as in transformers: any, or such of about the same length, so that less is
    padding; drawn anew each epoch either way."""


class EvaluationSection(Section):
    """What is measured on held-out text besides loss, perplexity and token accuracy; see docs/evaluation.md."""

    measures: Exposure[tuple[Literal["exact_match", "rouge_l", "accuracy", "macro_f1"], ...]] = ()
    """`exact_match` and `rouge_l` compare greedily generated text with the completions; `accuracy` and `macro_f1`
    classify: the label word that is likeliest as completion is the prediction. All need prompts and completions."""

    max_new_tokens: Exposure[int] = Field(64, ge=1)
    """Tokens that are generated at most in answer to a prompt."""

    num_examples: Exposure[int] = Field(32, ge=0)
    """Prompts that are answered in an evaluation, spread evenly over the held-out examples; 0 answers all. Classifying
    takes all."""

    label_words: Exposure[tuple[str, ...]] = ()
    """The label words, spelt as the completions are, a leading space included; empty takes each client's from its own
    completions."""

    @property
    def generates(self) -> bool:
        """Whether prompts are answered."""
        return bool({"exact_match", "rouge_l"} & set(self.measures))

    @property
    def classifies(self) -> bool:
        """Whether label words are compared."""
        return bool({"accuracy", "macro_f1"} & set(self.measures))

    @model_validator(mode="after")
    def _has_words_to_choose_from(self) -> Self:
        if len(set(self.label_words)) != len(self.label_words) or len(self.label_words) == 1 or "" in self.label_words:
            raise ValueError("label_words must be two or more different words, or [] to take them from the data")
        if self.label_words and not self.classifies:
            raise ValueError('label_words are for classification: add "accuracy" or "macro_f1" to measures')
        return self


class LinkSection(Section):
    """The wire between one client and the server."""

    max_in_flight: Operation[int] = Field(2, ge=1, le=64)
    """Micro-batches a client may have under way at once."""

    frame_bytes: Operation[int] = Field(1 << 18, ge=1 << 12, le=1 << 26)
    """Largest frame a tensor is cut into."""

    heartbeat_interval: Operation[float] = Field(2.0, gt=0)
    """Seconds between two heartbeats on the control connection."""

    heartbeat_timeout: Operation[float] = Field(8.0, gt=0)
    """Seconds of silence on the control connection after which the peer counts as gone."""

    slowest_link_bytes_per_second: Operation[float] = Field(250_000.0, gt=0)
    """The slowest client link to allow for (default 2 Mbit/s); a frame must pass it in less than half the heartbeat
    timeout, and a message that is slower than this is taken for lost."""

    max_rms: Operation[float] = Field(1e6, gt=0)
    """Largest root mean square of a tensor's values that either side takes from the other; larger ones count as poison,
    as NaN and infinity do."""

    max_caches: Operation[int] = Field(2, ge=1)
    """Generations that one client may have under way at once, each with a key-value cache on the server."""

    max_cache_tokens: Operation[int] = Field(16384, ge=1)
    """Tokens, rows times positions, that all caches of one client may hold on the server."""

    cache_timeout: Operation[float] = Field(300.0, gt=0)
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


class StorageSection(Section):
    """What both sides keep on disk so that no acknowledged step is lost."""

    durability: Identity[Literal["redo", "snapshot"]] = "redo"
    """`redo`: a step's gradients are on disk before it is acknowledged, so it survives any crash; `snapshot`: only
    merges are, and all sides go back to the last one together (for full training, whose records are as large as the
    model)."""

    fsync: Operation[Literal["always", "interval", "never"]] = "always"
    """When writes are forced through to the disk: before every acknowledgement, every `fsync_interval`, or when the
    system likes; the last two survive a crash of the process but not a power failure."""

    fsync_interval: Operation[float] = Field(1.0, gt=0)
    """Seconds between two forced writes with `fsync = "interval"`."""

    snapshot_steps: Operation[int] = Field(50, ge=1)
    """Commits after which a snapshot is taken between two merges; bounds the log's size and the time to recover."""

    keep_snapshots: Operation[int] = Field(2, ge=0)
    """Generations of snapshots, with the log since each, that are kept; at least 2 for a damaged one to have a
    predecessor, 0 keeps all, so that `splitfl replay` can begin at the first step."""

    keep_named: Operation[int] = Field(8, ge=1)
    """Snapshots of the backbone that checkpoints of clients in loops of their own name (`federation.num_rounds = 0`);
    the oldest goes when another is kept."""

    @model_validator(mode="after")
    def _has_a_predecessor(self) -> Self:
        if self.keep_snapshots == 1:
            raise ValueError("keep_snapshots must be 2 or more, or 0 for all: a damaged snapshot needs a predecessor")
        return self


class ServerSection(Section):
    """The server's own: where it listens, computes and writes. Not sent to clients."""

    address: str = "tcp://127.0.0.1:5555"
    """Where to listen: tcp://HOST:PORT or ipc://PATH; on any host but loopback, `keys` must be set."""

    keys: OptionalPath = None
    """Folder made by `splitfl keygen`: the server's key pair and the clients it lets in (`splitfl authorize`); turns
    encryption and authentication on."""

    max_clients: int = Field(64, ge=1)
    """Clients that may be connected at once."""

    history: bool = False
    """Whether `history.jsonl` is written: every step invoked, acknowledged and applied, with hashes of the weights; for
    tests and audits."""

    run_id: str = Field("", pattern=r"^$|" + NAME_PATTERN)
    """Name of the run and of its folder; empty means date and time."""

    runs_dir: Path = Path("runs")
    """Folder in which the run's folder is made."""

    cache_dir: OptionalPath = None
    """Folder for prepared client parts; empty means the user's cache."""

    device: str = "cpu"
    """Where the backbone computes: cpu, cuda, cuda:1, mps, as in torch. Not run on a GPU yet."""

    device_map: Literal["", "auto", "balanced", "balanced_low_0", "sequential"] = ""
    """How Accelerate spreads the backbone's blocks over this machine's GPUs; empty keeps them on `device`. Not run on a
    GPU yet."""

    num_threads: int = Field(0, ge=0)
    """Threads torch computes with; 0 leaves it to torch."""

    export_model: bool = True
    """Whether the trained model is written to the run's folder at the end."""


class ClientSection(Section):
    """Who this client is and where its server is."""

    client_id: str = Field("", pattern=r"^$|" + NAME_PATTERN)
    """Name of this client in reports and merges; letters, digits, `.`, `_` and `-`."""

    server_address: str = "tcp://127.0.0.1:5555"
    """The server's address; an enrolment file brings its own."""

    keys: OptionalPath = None
    """Folder made by `splitfl keygen`: this client's key pair; needed with `enrolment`."""

    enrolment: OptionalPath = None
    """File from the server's operator (`splitfl authorize`): the server's address and public key and this client's
    name; turns encryption and authentication on."""

    model_name_or_path: str = ""
    """The run's model, if this machine has it or may have it from the hub: a directory or a hub id. Layers that are bit
    for bit the server's are taken from there; empty means that the server sends them."""

    socks_proxy: str = Field("", pattern=r"^$|" + PROXY_PATTERN)
    """SOCKS5 proxy to reach the server through, as HOST:PORT; empty means none."""

    micro_batch_rows: int = Field(0, ge=0)
    """Rows that this client sends at once at most: a micro-batch of the run goes in pieces where it has more, which is
    the same step to rounding. For a client or a server with too little memory; 0 sends micro-batches whole."""

    output_dir: Path = Path("client-runs")
    """Folder for this client's own metrics; nothing in it is sent."""

    cache_dir: OptionalPath = None
    """Folder for layers and tokenizers received from servers; empty means the user's cache."""

    device: str = "cpu"
    """Where this client computes: cpu, cuda, mps, as in torch. Not run on a GPU yet."""

    num_threads: int = Field(0, ge=0)
    """Threads torch computes with; 0 leaves it to torch."""

    connect_timeout: float = Field(60.0, gt=0)
    """Seconds to wait for a server's first answer."""

    reconnect_timeout: float = Field(600.0, gt=0)
    """Seconds for which a client tries to reach a server that it has lost; then it ends, to be started again."""

    history: bool = False
    """Whether `history.jsonl` is written: every step invoked, acknowledged and applied, with hashes of the weights; for
    tests and audits."""


class DataSection(Section):
    """The client's text, which never leaves this machine."""

    path: Path = Path("train.jsonl")
    """Training text: .jsonl, .csv, .tsv or .parquet (with `text`, `messages`, or `prompt` and `completion`), or .txt
    (an example a line); see docs/data.md."""

    eval_path: OptionalPath = None
    """Held-out text of the same form; empty means a share of `path` is held out."""

    eval_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of `path` held out when there is no `eval_path`; 0 means no evaluation."""

    also_evaluate: dict[str, Path] = {}
    """Further held-out files by name, evaluated at the end and reported under that name."""

    text_field: str = "text"
    """Field or column that holds a whole example."""

    messages_field: str = "messages"
    """Field or column that holds a conversation: a list of objects with `role` and `content`; the assistant's turns are
    learned."""

    prompt_field: str = "prompt"
    """Field or column that holds what is given; no loss is taken on it."""

    completion_field: str = "completion"
    """Field or column that holds what is to be learned."""

    @model_validator(mode="after")
    def _has_plain_names_for_what_it_evaluates_also(self) -> Self:
        if wrong := [name for name in self.also_evaluate if not re.fullmatch(ALSO_NAME_PATTERN, name)]:
            raise ValueError(
                f"also_evaluate has the name {wrong[0]!r:.70}: names are 1 to 58 letters, digits, blanks,"
                " '.', '_' and '-'"
            )
        if len(self.also_evaluate) > MAX_ALSO:
            raise ValueError(f"also_evaluate names {len(self.also_evaluate)} files, and {MAX_ALSO} are the most")
        return self

    @model_validator(mode="after")
    def _evaluates_if_it_evaluates_also(self) -> Self:
        if self.also_evaluate and self.eval_path is None and not self.eval_fraction:
            raise ValueError("also_evaluate needs held-out text of the client's own: set eval_path or eval_fraction")
        return self


class PolicySection(Section):
    """What this client takes part in, whatever the server's settings say: the client has the last word."""

    model_config = ConfigDict(allow_inf_nan=False)

    min_bottom_layers: int = Field(1, ge=0)
    """Fewest blocks below the first cut (`model.bottom_layers`); without one a look into a table gives the text."""

    min_top_layers: int = Field(1, ge=0)
    """Fewest blocks above the last cut (`model.top_layers`)."""

    allow_embeddings: bool = False
    """Whether the token embeddings may train: rows that change in an upload tell which tokens were used."""

    allow_answers: bool = False
    """Whether held-out prompts may be answered by generating through the server (`evaluation.measures` with
    `exact_match` or `rouge_l`)."""

    max_rounds: int = Field(1000, ge=1)
    """Most rounds of a run."""

    max_steps: int = Field(100_000, ge=1)
    """Most training steps of a run that this client begins, those that came to nothing included, over all starts."""

    max_step_rows: int = Field(4096, ge=1)
    """Most rows of a step (`federation.per_device_train_batch_size` times `gradient_accumulation_steps`) and of a
    micro-batch in evaluation: they take memory here."""

    max_bytes_sent: int = Field(10**12, ge=1)
    """Most bytes that this client sends in a run, over all starts."""

    max_file_bytes: int = Field(32 * 10**9, ge=1)
    """Most bytes of files (model, tokenizer) that a server may have this client store in joining."""

    max_hours: float = Field(336.0, gt=0)
    """Most hours that this client is connected in a run, over all starts."""

    max_silence: float = Field(300.0, gt=0)
    """Longest `link.heartbeat_timeout`: seconds for which a server that says nothing is waited for."""

    max_rms: float = Field(1e6, gt=0)
    """Largest root mean square of a tensor that is taken from the server, where `link.max_rms` is not lower."""

    max_learning_rate: float = Field(10.0, gt=0)
    """Largest `optimizer.learning_rate`."""

    known_weights: str = Field("", pattern=r"^$|^own$|^[0-9a-f]{64}$")
    """What the first layers must be: the SHA-256 of the client's part of a checkpoint that you know (`splitfl check`
    prints it), or "own" for those of `client.model_name_or_path`; empty takes what the server sends. What merges bring
    later is vouched for by nothing."""

    def objections_to(self, run: "RunConfig") -> list[str]:
        """Say what this policy does not allow in a run's settings, each with the setting that would allow it."""
        return list(self._objections_to(run))

    def _objections_to(self, run: "RunConfig") -> Iterator[str]:
        federation = run.federation
        for name in ("bottom_layers", "top_layers"):
            if (found := getattr(run.model, name)) < (least := getattr(self, f"min_{name}")):
                yield f"model.{name} = {found} (policy.min_{name} = {least})"
        if run.train.embeddings and not self.allow_embeddings:
            yield "train.embeddings = true (policy.allow_embeddings = false)"
        if run.evaluation.generates and not self.allow_answers:
            yield "evaluation.measures has prompts answered through the server (policy.allow_answers = false)"
        bounds = {
            "federation.num_rounds": (federation.num_rounds, "max_rounds"),
            "federation.num_rounds * local_steps": (run.total_steps, "max_steps"),
            "federation.per_device_train_batch_size * gradient_accumulation_steps": (
                federation.per_device_train_batch_size * federation.gradient_accumulation_steps,
                "max_step_rows",
            ),
            "federation.per_device_eval_batch_size": (federation.per_device_eval_batch_size, "max_step_rows"),
            "link.heartbeat_timeout": (run.link.heartbeat_timeout, "max_silence"),
            "optimizer.learning_rate": (run.optimizer.learning_rate, "max_learning_rate"),
        }
        for name, (value, bound) in bounds.items():
            if value > (most := getattr(self, bound)):
                yield f"{name} = {value:,} (policy.{bound} = {most:,})"


class Config(Section):
    """A whole tree: read it with `load`, see `fingerprint` for comparing two."""

    command: ClassVar[str]

    @classmethod
    def load(cls, path: Path | None, overrides: Iterable[str] = ()) -> Self:
        """Read TOML, lay `section.key=value` strings over it; raise `ConfigError` naming the setting and the rule."""
        laid_over = tuple(overrides)
        source = "--set" if path is None else f"{path} with --set" if laid_over else str(path)
        return cls.from_tree(_read_tree(path, laid_over, cls), source=source)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], *, source: str) -> Self:
        """Build the tree from plain values; `source` is named in the error."""
        if foreign := _of_the_other_role(cls, tree):
            raise ConfigError(f"{source} {foreign}")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_explain(cls, error)}") from None


class RunConfig(Config):
    """What both roles must agree on; the welcome carries it to every client."""

    seed: Identity[int] = Field(42, ge=0, lt=2**31)
    """Seed of adapters, data order, dropout and client sampling."""

    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    lora: LoraSection = LoraSection()
    optimizer: OptimizerSection = OptimizerSection()
    federation: FederationSection = FederationSection()
    strategy: StrategySection = StrategySection()
    merge: MergeSection = MergeSection()
    text: TextSection = TextSection()
    evaluation: EvaluationSection = EvaluationSection()
    link: LinkSection = LinkSection()
    storage: StorageSection = StorageSection()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of one client that takes part in every round."""
        return self.federation.num_rounds * self.federation.local_steps

    @property
    def num_training_steps(self) -> int:
        """Steps that the schedule runs over."""
        return self.optimizer.num_training_steps or self.total_steps

    @property
    def has_own_loops(self) -> bool:
        """Whether each client trains in a loop of its own, without rounds and merges."""
        return self.federation.num_rounds == 0

    @property
    def is_buffered(self) -> bool:
        """Whether each client has rounds of its own, and layers are merged as they come in."""
        return self.federation.strategy == "FedBuff"

    @property
    def proximal_mu(self) -> float:
        """Weight of the proximal term in a client's gradients, 0 for every strategy but FedProx."""
        return self.strategy.proximal_mu if self.federation.strategy == "FedProx" else 0.0

    @property
    def has_controls(self) -> bool:
        """Whether control variates travel with the merged layers."""
        return self.federation.strategy == "SCAFFOLD"

    @property
    def backbone_trains(self) -> bool:
        """Whether the server's weights move at all."""
        return self.federation.server_mode != "frozen" and self.train.backbone != "none"

    @property
    def has_copies(self) -> bool:
        """Whether each client trains a copy of the backbone's trainable tensors of its own."""
        return self.federation.server_mode == "per_client" and self.backbone_trains

    @property
    def bottom_trains(self) -> bool:
        """Whether anything below the first cut trains, so that its gradient must be sent back."""
        return self.train.embeddings or (self.train.bottom != "none" and self.model.bottom_layers > 0)

    @model_validator(mode="after")
    def _strategy_uses_its_options(self) -> Self:
        strategy = self.federation.strategy
        for name in self.strategy.unused_by(strategy):
            users = ", ".join(sorted(self.strategy.USED_BY[name]))
            raise ValueError(
                f"strategy.{name} = {getattr(self.strategy, name)} is an option of {users}: leave it out, or choose"
                f" another federation.strategy than {strategy}"
            )
        return self

    @model_validator(mode="after")
    def _controls_are_what_they_mean(self) -> Self:
        """Refuse what would make of SCAFFOLD's controls something else than mean gradients."""
        if not self.has_controls or self.has_own_loops:
            return self
        if self.optimizer.optim != "sgd":
            raise ValueError(
                f"optimizer.optim = {self.optimizer.optim} does not go with federation.strategy = SCAFFOLD, whose"
                ' controls are gradients worked out from the way that plain SGD went: set optimizer.optim to "sgd", or'
                " choose another strategy"
            )
        if self.optimizer.weight_decay:
            raise ValueError(
                f"optimizer.weight_decay = {self.optimizer.weight_decay} does not go with federation.strategy ="
                " SCAFFOLD, whose controls are gradients worked out from the way that a client went, decay and all:"
                " set it to 0"
            )
        if self.federation.weight_by != "uniform":
            raise ValueError(
                f"federation.weight_by = {self.federation.weight_by} does not go with federation.strategy = SCAFFOLD:"
                " its controls are plain means over the clients, which draw every merge to where all clients count"
                ' alike, so set weight_by to "uniform"'
            )
        if self.has_copies:
            raise ValueError(
                f"federation.server_mode = {self.federation.server_mode} does not go with federation.strategy ="
                " SCAFFOLD, which corrects the clients' layers alone, and copies of the backbone would drift"
                " uncorrected: choose shared, sequential or frozen"
            )
        return self

    @model_validator(mode="after")
    def _has_what_fed_buff_needs(self) -> Self:
        if self.is_buffered and (objections := list(self._objections_to_fed_buff())):
            raise ValueError('federation.strategy = "FedBuff": ' + "; ".join(objections))
        return self

    def _objections_to_fed_buff(self) -> Iterator[str]:
        federation, schedule = self.federation, self.optimizer.lr_scheduler_type
        if federation.server_mode not in ("sequential", "frozen"):
            why = {
                "shared": "has clients wait for each other, and FedBuff has none wait",
                "per_client": "merges the copies of clients that have begun together, and with FedBuff none do",
            }
            yield (
                f'federation.server_mode = "{federation.server_mode}" {why[federation.server_mode]}: set it to'
                ' "sequential" or "frozen"'
            )
        if not schedule.startswith("constant"):
            yield (
                f'optimizer.lr_scheduler_type = "{schedule}" needs a last step, and how many steps a client comes to is'
                ' not known beforehand: set it to "constant" or "constant_with_warmup"'
            )
        if self.storage.durability != "redo":
            yield (
                f'storage.durability = "{self.storage.durability}" takes all clients back to one merge, and they are at'
                ' different ones: set it to "redo"'
            )
        unused = {"fraction_train": 1.0, "min_train_clients": 1, "partial_work": "drop"}
        for name, usual in unused.items():
            if (value := getattr(federation, name)) != usual:
                yield f"federation.{name} = {value} is of rounds that all clients share: leave it out"
        if federation.compares_rounds:
            yield (
                "federation.early_stopping_patience and load_best_model_at_end compare rounds that all clients share:"
                " leave them out"
            )

    @model_validator(mode="after")
    def _measures_what_it_compares(self) -> Self:
        metric = self.federation.metric_for_best_model
        if metric in OPTIONAL_MEASURES and metric not in self.evaluation.measures and self.federation.compares_rounds:
            raise ValueError(
                f"federation.metric_for_best_model = {metric}, which is not measured: add it to evaluation.measures"
            )
        return self

    @model_validator(mode="after")
    def _can_go_back_to_the_best(self) -> Self:
        if self.federation.load_best_model_at_end and set(self.merge.parts) != {"bottom", "top"}:
            raise ValueError(
                f"federation.load_best_model_at_end with merge.parts = {list(self.merge.parts)}: a part that is not"
                " merged is kept by its client as it is now, and not as it was after the best round; merge both parts,"
                " or leave load_best_model_at_end out"
            )
        return self

    @model_validator(mode="after")
    def _answers_fit_the_cache(self) -> Self:
        positions = self.text.max_seq_length + self.evaluation.max_new_tokens
        if self.evaluation.generates and positions > self.link.max_cache_tokens:
            raise ValueError(
                f"a prompt of text.max_seq_length = {self.text.max_seq_length} tokens and evaluation.max_new_tokens ="
                f" {self.evaluation.max_new_tokens} behind it are more than link.max_cache_tokens ="
                f" {self.link.max_cache_tokens}: raise that, or shorten one of them"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Return, as nested plain values, what decides the run's weights: with another value it is another run."""
        found = _of_class(RunConfig, self._plain(), SettingClass.IDENTITY)
        # with rounds or without is not how many
        found["federation"]["num_rounds"] = 0 if self.has_own_loops else "1 or more"
        if self.federation.compares_rounds:  # then what is measured decides which round the run ends with
            found["evaluation"] = self._plain()["evaluation"]
            found["federation"]["per_device_eval_batch_size"] = self.federation.per_device_eval_batch_size
        return found

    def exposure(self) -> dict[str, Any]:
        """Return, as nested plain values, what decides what leaves a client: its consent is for these."""
        return _of_class(RunConfig, self._plain(), SettingClass.EXPOSURE)

    def operation(self) -> dict[str, Any]:
        """Return, as nested plain values, what may change between two starts of the same run."""
        return _of_class(RunConfig, self._plain(), SettingClass.OPERATION)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over identity and exposure: what a client agrees to, as far as it can be agreed to."""
        agreed = {"identity": self.identity(), "exposure": self.exposure()}
        return hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Write the run's settings as one line of JSON with sorted keys."""
        return json.dumps(self._plain(), sort_keys=True)

    def _plain(self) -> dict[str, Any]:
        return self.model_dump(mode="json", include=set(RunConfig.model_fields))


class ServerConfig(RunConfig):
    """The server's file: the run's settings and the server's own."""

    command: ClassVar[str] = "server"

    server: ServerSection = ServerSection()

    def run_config(self) -> RunConfig:
        """Return what the clients get: the model's name without the server's folders, and nothing of `[server]`."""
        settings = json.loads(self.to_json())
        settings["model"]["model_name_or_path"] = Path(self.model.model_name_or_path).name
        return RunConfig.model_validate(settings)

    @model_validator(mode="after")
    def _names_a_model(self) -> Self:
        if not self.model.model_name_or_path:
            raise ValueError("model.model_name_or_path is empty: name a model directory or a hub id")
        return self


class ClientConfig(Config):
    """A client's file."""

    command: ClassVar[str] = "client"

    client: ClientSection = ClientSection()
    data: DataSection = DataSection()
    policy: PolicySection = PolicySection()

    @model_validator(mode="after")
    def _has_a_name(self) -> Self:
        if not self.client.client_id:
            raise ValueError("client.client_id is empty: give this client a name, such as clinic-a")
        return self


def classes_of(field: FieldInfo) -> tuple[SettingClass, ...]:
    """Return the classes that a setting is marked with: identity, exposure, both of them, or operation."""
    marks = [mark for mark in field.metadata if isinstance(mark, SettingClass)]
    return tuple(sorted(marks, key=list(SettingClass).index))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, before, now) of settings that differ in two nested trees of plain values; None is "not there"."""
    for key in sorted(before.keys() | now.keys()):
        then, here, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(then, Mapping) or isinstance(here, Mapping):
            yield from differences(then or {}, here or {}, f"{name}.")
        elif then != here:
            yield name, then, here


def default_cache_dir() -> Path:
    """Return the user's cache folder for splitfl, as the platform has it."""
    from platformdirs import user_cache_path

    return user_cache_path("splitfl")


def to_toml(config: Config) -> str:
    """Write the tree as TOML that `load` reads back to an equal tree; unset paths are left out."""
    import tomlkit

    return tomlkit.dumps(config.model_dump(mode="json", exclude_none=True))


def role_of(path: Path, overrides: Iterable[str] = ()) -> str:
    """Tell whose file this is by its sections: "client" if it has `[client]` or `[data]`, else "server"."""
    return "client" if {"client", "data", "policy"} & _read_tree(path, overrides).keys() else "server"


def _read_tree(path: Path | None, overrides: Iterable[str], config: type[Config] | None = None) -> dict[str, Any]:
    tree = {} if path is None else _read_toml(path)
    for override in overrides:
        _lay_over(tree, override, config)
    return tree


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; --config names a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _lay_over(tree: dict[str, Any], override: str, config: type[Config] | None) -> None:
    """Set one `section.key=value`; the value is TOML, or plain text where it is not or where text is wanted."""
    name, equals, text = override.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write --set section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    # no setting is a date, but a name may look like one, or like a number
    if isinstance(value, date | time) or (not isinstance(value, str) and _is_text(config, [*sections, key])):
        value = text.strip()
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
        tree = inner
    tree[key] = value


def _of_class(section: type[Section], values: Mapping[str, Any], wanted: SettingClass) -> dict[str, Any]:
    """Return of a section's plain values those of one class, sections that have none left out."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            if inner := _of_class(field.annotation, values[name], wanted):
                found[name] = inner
        elif wanted in classes_of(field):
            found[name] = values[name]
    return found


# What is wrong with a value of the wrong kind, by the name of pydantic's finding.
_WANTED = {
    "int_type": "must be a whole number, without quotes and decimal point",
    "float_type": "must be a number, without quotes",
    "bool_type": "must be true or false, without quotes",
    "string_type": "must be text, in quotes",
    "tuple_type": 'must be a list of texts, as in ["a", "b"]',
    "dict_type": "must be names and values, as in { name = value }",
}
# What a text must look like, by its pattern.
_RULES = {
    NAME_PATTERN: "must be 1 to 64 letters, digits, `.`, `_` or `-`, the first a letter or a digit",
    SHA256_PATTERN: "must be 64 hexadecimal digits, or empty",
    PROXY_PATTERN: "must be HOST:PORT, such as localhost:1080",
}

# Names that other programs have for our settings; the first one is meant that the tree at hand has.
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    other: names
    for names, others in {
        ("model.model_name_or_path",): "model name_or_path model_name model_path model_id base_model",
        ("model.bottom_layers",): "split_layer cut_layer",
        ("model.dtype",): "torch_dtype precision bf16",
        ("train.bottom",): "train",
        ("train.embeddings",): "train_embeddings",
        ("lora.r",): "rank lora_r lora_rank",
        ("lora.alpha",): "lora_alpha",
        ("lora.dropout",): "lora_dropout",
        ("lora.target_modules",): "modules lora_target_modules",
        ("optimizer.optim",): "optimizer type optimizer_type",
        ("optimizer.learning_rate",): "lr step_size",
        ("optimizer.lr_scheduler_type",): "scheduler schedule lr_scheduler lr_schedule",
        ("optimizer.warmup_steps",): "warmup warmup_ratio",
        ("optimizer.max_grad_norm",): "clip grad_clip gradient_clipping max_norm clip_norm",
        ("optimizer.adam_beta1",): "beta1 betas",
        ("optimizer.adam_beta2",): "beta2",
        ("optimizer.adam_epsilon",): "eps epsilon adam_eps",
        ("federation.num_rounds",): "rounds n_rounds num_server_rounds global_rounds communication_rounds",
        ("federation.local_steps",): "steps num_steps max_steps epochs num_epochs local_epochs num_train_epochs",
        ("federation.per_device_train_batch_size",): "batch batch_size train_batch_size micro_batch_size bs",
        ("federation.gradient_accumulation_steps",): "grad_accum accumulation_steps gradient_accumulation",
        ("federation.per_device_eval_batch_size",): "eval_batch_size",
        ("federation.min_available_clients",): "num_clients n_clients clients min_clients",
        ("federation.min_train_clients",): "min_fit_clients",
        ("federation.fraction_train",): "fraction_fit client_fraction",
        ("federation.strategy",): "strategy aggregator aggregation",
        ("federation.server_mode",): "mode",
        ("strategy.proximal_mu",): "mu",
        ("text.max_seq_length",): "max_length max_len max_seq_len seq_length seq_len block_size context_length",
        ("server.address", "client.server_address"): "server address host port listen bind url",
        ("server.run_id",): "name run_name",
        ("server.runs_dir", "client.output_dir"): "out output out_dir save_dir run_dir",
        ("server.num_threads", "client.num_threads"): "threads",
        ("client.client_id",): "client id",
        ("data.path",): "data data_path dataset train_file train_path file",
        ("data.eval_path",): "eval_file validation_file test_file",
        ("data.eval_fraction",): "val_fraction test_size holdout",
    }.items()
    for other in others.split()
}


def _explain(tree: type[Config], error: ValidationError) -> str:
    """Put pydantic's findings into one sentence a person can act on."""
    return "; ".join(_explain_one(tree, finding) for finding in error.errors())


def _explain_one(tree: type[Config], finding: Any) -> str:
    where = [str(part) for part in finding["loc"]]
    name = ".".join(where)
    match finding["type"]:
        case "extra_forbidden":
            return f"unknown setting {name}{_nearest(tree, where)}"
        case "model_type":
            return _no_section(tree, where, finding["input"])
        case kind if kind in _WANTED:
            return f"{name} = {_as_toml(finding['input'])}: {_WANTED[kind]}"
        case "string_pattern_mismatch" if rule := _RULES.get(finding["ctx"]["pattern"].removeprefix("^$|")):
            return f"{name} = {finding['input']!r}: {rule}"
        case "literal_error":
            return f"{name} = {_as_toml(finding['input'])}: {_one_of(finding)}"
    message = finding["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if finding["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name} = {_as_toml(finding['input'])}: {message}"


def _one_of(finding: Any) -> str:
    """Say what is known, and what was meant if it was nearly that."""
    known, given = finding["ctx"]["expected"], str(finding["input"]).lower()
    names = {name.lower(): name for name in re.findall("'([^']*)'", known)}
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    return f"must be {known}" + (f"; did you mean {names[close[0]]!r}?" if close else "")


def _no_section(tree: type[Config], where: Sequence[str], value: object) -> str:
    """Say how a section is written to someone who has written something else under its name."""
    name = ".".join(where)
    if isinstance(value, list):
        return f"{name} is one section, and the file has a list of them: write [{name}], in single brackets"
    meant = _other_name(tree, where)
    return f"{name} = {_as_toml(value)}: {name} is a section" + (f"; did you mean {meant}?" if meant else "")


def _as_toml(value: object) -> str:
    """Write a value as it was written: true and not True."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _of_the_other_role(tree: type[Config], given: Mapping[str, Any]) -> str:
    """Say that this is the other role's file, or that it has sections of the other role's; "" where it has not."""
    roles: dict[type[Config], type[Config]] = {ServerConfig: ClientConfig, ClientConfig: ServerConfig}
    others = roles.get(tree)
    if others is None:
        return ""
    names = [name for name in given if name in others.model_fields and name not in tree.model_fields]
    foreign = [f"[{name}]" for name in names if isinstance(given[name], Mapping)] or names
    if not foreign:
        return ""
    named = " and ".join([", ".join(foreign[:-1]), foreign[-1]] if len(foreign) > 1 else foreign)
    if any(name in tree.model_fields for name in given):
        return f"is a {tree.command}'s file, and {named} belongs in a {others.command}'s: move it there"
    return (
        f"is a {others.command}'s file (it has {named}): `splitfl {others.command}` takes it, and `splitfl"
        f" {tree.command}` one with {_needs(tree)}"
    )


def _needs(tree: type[Config]) -> str:
    return "[client] and [data]" if tree is ClientConfig else "[model], [federation] and [server]"


def _is_text(tree: type[Section] | None, where: Sequence[str]) -> bool:
    """Tell whether a setting is text, so that `--set` need not quote a value that looks like a number."""
    for part in where[:-1]:
        field = tree.model_fields.get(part) if tree is not None else None
        tree = field.annotation if field is not None and _is_section(field.annotation) else None
    field = tree.model_fields.get(where[-1]) if tree is not None else None
    return field is not None and field.annotation in (str, Path, Path | None)


def _nearest(tree: type[Section], where: Sequence[str]) -> str:
    """Name the known setting that is meant by an unknown one, or that is most like it, here or in another section."""
    if meant := _other_name(tree, where):
        return f"; did you mean {meant}?"
    here = _known(tree)
    same_key = [name for name in here if name.split(".")[-1] == where[-1]]
    close = same_key or difflib.get_close_matches(".".join(where), [*tree.model_fields, *here], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(_siblings(tree, where))}"


def _other_name(tree: type[Section], where: Sequence[str]) -> str:
    """Return the setting that other programs call this, "" if none is known or this tree has none."""
    known = _known(tree)
    return next((name for name in _OTHER_NAMES.get(where[-1].lower(), ()) if name in known), "")


def _siblings(tree: type[Section], where: Sequence[str]) -> Iterable[str]:
    for part in where[:-1]:
        field = tree.model_fields.get(part)
        if field is None or not _is_section(field.annotation):
            break
        tree = field.annotation
    return tree.model_fields


def _known(tree: type[Section], prefix: str = "") -> list[str]:
    names = []
    for name, field in tree.model_fields.items():
        if _is_section(field.annotation):
            names += _known(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)
