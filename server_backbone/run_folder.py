"""Which run a start of the server is: a new one, or one in `server.runs_dir` that goes on; and what its folder says.

A run is known by what decides its weights (`RunConfig.identity`, the model's content among it), not by its place. So
the folder may be copied to another machine. Other changes since the last start are told, and take effect.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from splitfl.config.reading import to_toml
from splitfl.config.run import differences
from splitfl.config.trees import RunConfig, ServerConfig
from splitfl.durability.disk import RealDisk, sync_dir
from splitfl.durability.format import check_format
from splitfl.errors import ConfigError, StorageError
from splitfl.models.export import CONFIG_FILE

# Within a run's folder: what the server needs to go on, and the mark that all its rounds are done.
STATE_DIR = "state"
FINISHED_FILE = "finished"
# The one identity that an operator may set anew for a run that is under way, by naming the run.
_HORIZON = "optimizer.num_training_steps"
# An interrupted run that differs in more than these is none that somebody may have meant to go on with.
_FEW = 3
# Where a run lies, which is not how it is operated.
_PLACE = ("run_id", "runs_dir")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting that is another one than at the last start."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} (was {self.before!r}, is {self.now!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """A run's folder, and the settings of this start."""

    path: Path
    config: ServerConfig
    """With the model's hash and the schedule's horizon."""
    before: ServerConfig | None = None
    """The settings of the last start, None for a new run."""
    notes: tuple[str, ...] = ()
    """For the operator."""

    @property
    def is_resumed(self) -> bool:
        """Whether the run goes on."""
        return self.before is not None

    @property
    def changes(self) -> list[Change]:
        """What differs from the last start, the server's own settings included."""
        if self.before is None:
            return []
        return _changes(_all_of(self.before), _all_of(self.config))

    @property
    def raises_num_rounds(self) -> bool:
        """Whether the run has more rounds than at the last start."""
        then = self.before.federation.num_rounds if self.before is not None else 0
        return 0 < then < self.config.federation.num_rounds

    def begin(self) -> None:
        """Write the settings as used, and take the mark of the end away; a model's path is made absolute."""
        (self.path / FINISHED_FILE).unlink(missing_ok=True)  # first: else a run with the new settings could look done
        path = Path(self.config.model.model_name_or_path).expanduser()
        config = self.config
        if path.exists():
            config = _with(config, "model", model_name_or_path=str(path.resolve()))
        half_done = self.path / f".{CONFIG_FILE}.{os.getpid()}.partial"
        try:
            with half_done.open("w", encoding="utf-8") as file:
                file.write(to_toml(config))
                file.flush()
                os.fsync(file.fileno())
            half_done.replace(self.path / CONFIG_FILE)
            sync_dir(self.path)
        except OSError as error:
            raise StorageError.at(self.path / CONFIG_FILE, error) from None
        finally:
            half_done.unlink(missing_ok=True)

    def finish(self) -> None:
        """Mark that all rounds are done."""
        (self.path / FINISHED_FILE).touch(mode=0o600)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A run that a start may go on with, if the model is the same."""

    path: Path
    before: ServerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is found in `server.runs_dir` before the model is looked at."""

    config: ServerConfig
    candidates: tuple[Candidate, ...] = ()
    """The latest first."""
    notes: tuple[str, ...] = ()

    def settle(self, checkpoint_sha256: str) -> RunFolder:
        """Choose by what the model holds; raise `ConfigError` where that is not what was named."""
        asked = self.config.model.checkpoint_sha256
        if asked and asked != checkpoint_sha256:
            raise ConfigError(
                f"model.checkpoint_sha256 = {asked}, but {self.config.model.model_name_or_path} holds"
                f" {checkpoint_sha256}: give the server the model that was meant, or leave that setting out"
            )
        other: list[str] = []
        for each in self.candidates:
            was = each.before.model.checkpoint_sha256
            if was == checkpoint_sha256:
                return self._go_on(each, checkpoint_sha256)
            other.append(
                f"{each.path} was begun with another model than {self.config.model.model_name_or_path} now holds"
                f" (model.checkpoint_sha256 was {was:.12}…, is {checkpoint_sha256:.12}…)"
            )
        if self.config.server.run_id and other:
            raise ConfigError(f"{other[0]}: give it that model again, or set server.run_id to another name")
        return self._new(checkpoint_sha256, [f"a new run begins: {text}" for text in other[:1]])

    def _new(self, checkpoint_sha256: str, notes: list[str]) -> RunFolder:
        config = _settled(self.config, self.config.num_training_steps, checkpoint_sha256)
        run_id = config.server.run_id or datetime.now().strftime("%Y%m%d-%H%M%S")
        path = config.server.runs_dir / run_id
        return RunFolder(path=path, config=config, notes=(*self.notes, *notes, *_said_of_schedule(config)))

    def _go_on(self, found: Candidate, checkpoint_sha256: str) -> RunFolder:
        before = found.before
        horizon = self.config.optimizer.num_training_steps or before.num_training_steps
        config = _settled(self.config, horizon, checkpoint_sha256)
        notes = list(self.notes)
        if exposed := _changes(before.run_config().exposure(), config.run_config().exposure()):
            notes.append(f"what leaves a client is to change, and each is asked again: {_listed(exposed)}")
        if horizon != before.num_training_steps:
            notes.append(
                f"the learning rate's schedule runs over {horizon} steps from now on, and no longer over"
                f" {before.num_training_steps} ({_HORIZON})"
            )
        return RunFolder(
            path=found.path, config=config, before=before, notes=(*notes, *_said_of_schedule(config, before))
        )


def search(config: ServerConfig, *, resumes: bool) -> Search:
    """Look for the run that these settings are of; raise `ConfigError` where a named one cannot be gone on with."""
    if config.server.run_id:
        return _named(config, resumes=resumes)
    return _unnamed(config) if resumes else Search(config=config)


def _named(config: ServerConfig, *, resumes: bool) -> Search:
    run_dir = config.server.runs_dir / config.server.run_id
    if not (run_dir / CONFIG_FILE).exists():
        return Search(config=config)
    elsewhere = "set server.run_id to another name, or leave it empty for date and time"
    if not resumes:
        raise ConfigError(f"{run_dir} holds a run: {elsewhere}")
    before = _read(run_dir)
    other = _identity_changes(before, config)
    if other and [change.name for change in other] != [_HORIZON]:
        raise ConfigError(
            f"{run_dir} holds a run with other settings, which decide its weights: {_listed(other)}. Give it those"
            " again, or set server.run_id to another name"
        )
    if (run_dir / FINISHED_FILE).exists():
        _check_prolonged(run_dir, before, config, elsewhere)
    return Search(config=config, candidates=(Candidate(path=run_dir, before=before),))


def _check_prolonged(run_dir: Path, before: ServerConfig, config: ServerConfig, elsewhere: str) -> None:
    """Raise unless a finished run has more rounds to go, and what it needs for them."""
    done = before.federation.num_rounds
    if config.federation.num_rounds <= done:
        raise ConfigError(
            f"{run_dir} holds a finished run of {done} rounds: raise federation.num_rounds to prolong"
            f" it, or {elsewhere}"
        )
    if not (run_dir / STATE_DIR).is_dir():
        raise ConfigError(
            f"{run_dir} holds a finished run of {done} rounds whose state was removed (`splitfl purge`), so it cannot"
            f" be prolonged: {elsewhere}"
        )


def _unnamed(config: ServerConfig) -> Search:
    """Look at all runs that have not gone through to their end, the latest first."""
    found: list[Candidate] = []
    close: list[tuple[list[Change], Path]] = []
    unread: list[str] = []
    paths = sorted(config.server.runs_dir.glob(f"*/{CONFIG_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for run_dir in (path.parent for path in paths):
        if (run_dir / FINISHED_FILE).exists() or not (run_dir / STATE_DIR).is_dir():
            continue
        try:
            before = _read(run_dir)
            check_format(RealDisk(), run_dir / STATE_DIR)
        except ConfigError as error:
            unread.append(str(error))
            continue
        other = _identity_changes(before, config)
        if other:
            close.append((other, run_dir))
        else:
            found.append(Candidate(path=run_dir, before=before))
    notes = [] if found else [*_nearly(close), *unread[:1]]
    return Search(config=config, candidates=tuple(found), notes=tuple(notes))


def _nearly(close: list[tuple[list[Change], Path]]) -> Iterator[str]:
    """Say of the interrupted run that differs in least why it is not gone on with, if it differs in little."""
    other, run_dir = min(close, key=lambda each: len(each[0]), default=([], Path()))
    if 0 < len(other) <= _FEW:
        yield (
            f"a new run begins: {run_dir} was interrupted, and differs in what decides the weights: {_listed(other)}."
            " To go on with it, give it those again"
        )


def _read(run_dir: Path) -> ServerConfig:
    """Read a run's settings; settings that this splitfl does not know, or understands otherwise, are named."""
    try:
        return ServerConfig.load(run_dir / CONFIG_FILE)
    except ConfigError as error:
        raise ConfigError(
            f"{run_dir} holds a run whose settings this splitfl does not take: {error}. Go on with it with the splitfl"
            " that began it, or begin another"
        ) from None


def _identity_changes(before: ServerConfig, config: ServerConfig) -> list[Change]:
    """Return what makes it another run, as far as the settings tell: what they leave open is taken from before."""
    horizon = config.optimizer.num_training_steps or before.num_training_steps
    now = _settled(config, horizon, config.model.checkpoint_sha256 or before.model.checkpoint_sha256)
    then = _settled(before, before.num_training_steps, before.model.checkpoint_sha256)
    return _changes(then.run_config().identity(), now.run_config().identity())


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    return [Change(name=name, before=then, now=here) for name, then, here in differences(before, now)]


def _listed(changes: list[Change]) -> str:
    return "; ".join(map(str, changes))


def _all_of(config: ServerConfig) -> dict[str, Any]:
    """Return the settings as a change is told: the model by its name, without where this run's folder is."""
    own = config.server.model_dump(mode="json", exclude=set(_PLACE))
    return {**config.run_config().model_dump(mode="json"), "server": own}


def _settled(config: ServerConfig, num_training_steps: int, checkpoint_sha256: str) -> ServerConfig:
    """Fill in what the settings leave open."""
    config = _with(config, "optimizer", num_training_steps=num_training_steps)
    return _with(config, "model", checkpoint_sha256=checkpoint_sha256)


def _with(config: ServerConfig, section: str, **values: Any) -> ServerConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _said_of_schedule(config: RunConfig, before: RunConfig | None = None) -> Iterator[str]:
    """Say that a run goes on after its schedule's end, where nothing is learned any more."""
    steps, horizon = config.total_steps, config.num_training_steps
    if not config.optimizer.ends_at_zero or steps <= horizon:
        return
    longer = ""
    if before is not None and before.total_steps < steps:
        longer = f"the run is prolonged from {before.total_steps} to {steps} steps of each client, and "
    yield (
        f"{longer}its learning rate is 0 from step {horizon + 1} of {steps} on, where the"
        f" {config.optimizer.lr_scheduler_type} schedule has ended ({_HORIZON} = {horizon}): set that to {steps} to go"
        " on learning"
    )
