"""What is trained: settings that decide the weights. With another value it is another run."""

from typing import ClassVar, Literal

from pydantic import Field

from splitfl.config.optional_measures import OptionalMeasure
from splitfl.config.patterns import SHA256_PATTERN
from splitfl.config.section import Exposure, Section, SettingClass

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

MeasureName = Literal["eval_loss", "perplexity", "token_accuracy", OptionalMeasure]


class Identity(Section):
    """A setting that a section of this kind declares decides the weights."""

    decides: ClassVar[SettingClass | None] = SettingClass.IDENTITY


class RunIdentity(Identity):
    """What a run's chance hangs on."""

    seed: int = Field(42, ge=0, lt=2**31)
    """Seed of adapters, data order, dropout and client sampling."""


class ModelIdentity(Identity):
    """What the model holds, where it is cut and in which numbers it computes."""

    checkpoint_sha256: str = Field("", pattern=r"^$|" + SHA256_PATTERN)
    """SHA-256 of the model's content (weights, config, tokenizer; docs/loading.md). The server finds it out when it
    starts and writes it into the run's settings. Set it, and another model is refused."""

    bottom_layers: Exposure[int] = Field(1, ge=0)
    """Blocks below the first cut, on the client, after the embedding."""

    top_layers: Exposure[int] = Field(1, ge=0)
    """Blocks above the last cut, on the client, before the final norm and the LM head."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights on both sides and of the activations on the wire."""

    attn_implementation: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention code of transformers, the same on both sides; "auto" is what transformers picks for the family."""


class TrainSection(Identity):
    """What trains, per part of the model."""

    bottom: Exposure[Part] = "lora"
    """The client's blocks below the first cut: adapters, all weights, or nothing."""

    top: Exposure[Part] = "lora"
    """The client's blocks above the last cut."""

    backbone: Exposure[Part] = "lora"
    """The server's blocks; `server_mode = "frozen"` overrides it with "none"."""

    backbone_layers: int = Field(0, ge=0)
    """How many of the server's blocks train, counted from the last; 0 means all of them."""

    norm_head: Exposure[bool] = False
    """Whether the final norm and the LM head train; a head tied to the embedding trains only if `embeddings` does."""

    embeddings: Exposure[bool] = False
    """Whether the token (and position) embeddings train; rows that change in an upload tell which tokens were used."""

    loss: Literal["chunked", "plain"] = "chunked"
    """`chunked`: no client ever holds the logits of a batch (within 1e-6 of plain in float32); `plain`: the library's
    own loss, for which split training equals unsplit training bit for bit."""


class LoraSection(Identity):
    """Low-rank adapters (LoRA) for every part that says "lora"."""

    r: int = Field(8, ge=1, le=4096)
    """Rank of the adapters."""

    alpha: float = Field(16.0, gt=0, le=1e6)
    """Scale of the adapters: their output is multiplied by alpha / r."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before each adapter while training."""

    target_modules: tuple[str, ...] = ()
    """Names of the linear layers in a block that get an adapter; empty means peft's choice for the model's family."""


class OptimizerSection(Identity):
    """The optimizer and its schedule, the same on both sides."""

    optim: Literal["adamw_torch", "sgd"] = "adamw_torch"
    """AdamW, or plain SGD without momentum."""

    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of both sides."""

    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices; vectors (norms and biases) never decay."""

    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first moment."""

    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's second moment."""

    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""

    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this global norm over both sides; 0 means no clipping."""

    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "linear"
    """Schedule over `num_training_steps`, as in transformers."""

    num_training_steps: int = Field(0, ge=0)
    """Steps of each client over which the schedule runs; after them a linear or cosine one stays at 0. 0 means the
    `num_rounds * local_steps` that the run has when it begins; a run that is prolonged keeps them."""

    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""

    backbone_lr: float = Field(0.0, ge=0)
    """Learning rate of the server's blocks with own-loop clients (`federation.num_rounds = 0`); 0 follows the
    client's."""

    @property
    def ends_at_zero(self) -> bool:
        """Whether the learning rate is 0 from the schedule's last step on."""
        return self.lr_scheduler_type in ("linear", "cosine")


class FederationIdentity(Identity):
    """How the backbone and the merges treat several clients."""

    server_mode: Exposure[Literal["shared", "sequential", "per_client", "frozen"]] = "shared"
    """`shared`: one backbone step from all clients' gradients; `sequential`: a step per client, one client at a time;
    `per_client`: each client trains a copy of the backbone's adapters (or weights) of its own, merged with the round;
    `frozen`: the backbone does not learn. docs/server-modes.md compares them."""

    local_steps: int = Field(10, ge=1)
    """Optimizer steps of each client per round."""

    per_device_train_batch_size: int = Field(4, ge=1)
    """Examples in one micro-batch; rows, each of several examples, where `text.packing` is on."""

    gradient_accumulation_steps: int = Field(2, ge=1)
    """Micro-batches in one step; with two or more, client and server compute at the same time."""

    strategy: StrategyName = "FedAvg"
    """How the client-side layers are merged; `[strategy]` has its options, docs/strategies.md the formulas."""

    weight_by: Literal["num_examples", "num_tokens", "uniform"] = "num_examples"
    """What weighs a client in a merge: its training examples, its label tokens of the round, or nothing."""

    fraction_train: float = Field(1.0, gt=0, le=1)
    """Share of the connected clients that train in a round, drawn with the run's seed."""

    optimizer_state: Literal["keep", "reset"] = "keep"
    """What becomes of a client's optimizer state when merged layers arrive."""

    client_max_grad_norm: float = Field(10.0, ge=0)
    """Where several clients share a step, the backbone's gradient from each is clipped to this norm before they are
    added up. So none outweighs the others; 0 means no such clipping."""

    metric_for_best_model: MeasureName = "eval_loss"
    """The measure by which rounds are compared, over all clients' held-out text (docs/evaluation.md); its name decides
    whether more is better."""

    early_stopping_patience: int = Field(0, ge=0)
    """Rounds in a row without improvement after which the run ends, as in transformers; 0 never ends it early. Needs
    `evaluate = "rounds"`."""

    early_stopping_threshold: float = Field(0.0, ge=0)
    """How much better than the best round so far a round must be to count as an improvement."""

    load_best_model_at_end: bool = False
    """Whether the run ends with the layers and the backbone of its best round, not of its last, on all clients and in
    the exported model. Needs `evaluate = "rounds"`."""

    partial_work: Literal["drop", "accept"] = "drop"
    """`drop`: clients still at work at `round_timeout` are left out of the merge; `accept`: they have `step_timeout`
    more to upload the result of their finished steps. A client's `num_examples` count by the share of the round's steps
    that it has finished."""

    @property
    def compares_rounds(self) -> bool:
        """Whether what happens next hangs on how good each round was."""
        return self.early_stopping_patience > 0 or self.load_best_model_at_end


class StrategyIdentity(Identity):
    """What a strategy does with the layers of a merge."""

    proximal_mu: float = Field(0.01, ge=0)
    """FedProx: how strongly a client's layers are pulled towards the last merge's; 0 is FedAvg."""

    server_learning_rate: float = Field(1.0, gt=0)
    """FedAvgM, FedBuff, SCAFFOLD: scale of the server's step."""

    server_momentum: float = Field(0.9, ge=0, lt=1)
    """FedAvgM: share of the last step that is kept; 0 and `server_learning_rate = 1` is FedAvg."""

    buffer_size: int = Field(2, ge=1)
    """FedBuff: uploads in a merge (K), from any clients; `federation.num_rounds` counts these merges."""

    max_staleness: int = Field(0, ge=0)
    """FedBuff: an upload begun more merges ago than this is dropped; 0 means that none is."""

    eta: float = Field(0.1, gt=0)
    """FedAdagrad, FedAdam, FedYogi: the server's learning rate, about the largest change of a value in a merge."""

    beta_1: float = Field(0.9, ge=0, lt=1)
    """FedAdam, FedYogi: the first moment's decay."""

    beta_2: float = Field(0.99, ge=0, lt=1)
    """FedAdam, FedYogi: the second moment's decay."""

    tau: float = Field(1e-3, gt=0)
    """FedAdagrad, FedAdam, FedYogi: added to the root of the second moment; a change far below it counts little."""

    beta: float = Field(0.2, ge=0, lt=0.5)
    """FedTrimmedAvg: share of the clients, rounded down, left out at each end of every value."""

    num_malicious_clients: int = Field(0, ge=0)
    """Krum, MultiKrum: how many clients may be up to no good (f); a merge needs 2 f + 3 clients."""

    num_clients_to_keep: int = Field(0, ge=0)
    """MultiKrum: how many of the best clients are averaged; 0 means all but `num_malicious_clients`."""

    clipping_norm: float = Field(1.0, gt=0)
    """NormClippedMean: largest norm of a client's change since the last merge, over all its merged layers."""

    max_client_weight: float = Field(0.5, gt=0, le=1)
    """Largest share of a merge that one client may be, whatever it says of its examples, in a merge of three clients or
    more. With fewer than 1 / `max_client_weight` all count alike; 1 means no bound (docs/strategies.md)."""


class MergeSection(Identity):
    """Which of the client-side layers are everyone's."""

    parts: Exposure[tuple[Literal["bottom", "top"], ...]] = ("bottom", "top")
    """What is uploaded and merged; a part that is not named stays each client's own and is not uploaded (personal
    heads), and [] merges nothing. A head tied to the embedding is the bottom's."""


class TextSection(Identity):
    """How every client turns text into tokens."""

    max_seq_length: Exposure[int] = Field(512, ge=2)
    """Tokens after which an example is cut off; the client reports how many were."""

    append_eos: bool = True
    """Whether each example ends with the tokenizer's end-of-sequence token."""

    packing: Exposure[bool] = False
    """Whether training examples share rows of up to `max_seq_length` tokens, without attention across them;
    `federation.per_device_train_batch_size` then counts rows, and the server is told where each example ends."""

    train_sampling_strategy: Literal["random", "group_by_length"] = "random"
    """Which examples share a micro-batch, as in transformers: any, or examples of about the same length, so that less
    is padding. They are drawn anew each epoch either way."""


class StorageIdentity(Identity):
    """What a recovered run goes back to."""

    durability: Literal["redo", "snapshot"] = "redo"
    """`redo`: a step's gradients are on disk before it is acknowledged, so it survives any crash; `snapshot`: only
    merges are, and all sides go back to the last one together (for full training, whose records are as large as the
    model)."""
