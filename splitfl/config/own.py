"""Each machine's own settings: the server's, a client's, its data and its policy. They never travel."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from splitfl.config.patterns import ALSO_NAME_PATTERN, MAX_ALSO, NAME_PATTERN, PROXY_PATTERN, OptionalPath
from splitfl.config.section import Section


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
    """Rows that this client sends at once at most. A micro-batch of the run goes in pieces where it has more, which is
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
    """Most training steps of a run that this client begins, over all starts; steps that came to nothing count too."""

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
    """The first layers that you know: the SHA-256 of the client's part of a checkpoint (`splitfl check` prints it), or
    "own" for the layers of `client.model_name_or_path`. Empty takes whatever the server sends. What merges bring later
    is vouched for by nothing."""


def default_cache_dir() -> Path:
    """Return the user's cache folder for splitfl, as the platform has it."""
    from platformdirs import user_cache_path

    return user_cache_path("splitfl")
