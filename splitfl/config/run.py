"""A run's settings, which both roles agree on, and what follows from them."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from splitfl.config.exposure import EvaluationSection
from splitfl.config.identity import LoraSection, MergeSection, OptimizerSection, RunIdentity, TextSection, TrainSection
from splitfl.config.kind import BackboneKind, RunKind
from splitfl.config.operation import LinkSection
from splitfl.config.reading import Config
from splitfl.config.section import SettingClass, of_class
from splitfl.config.sections import FederationSection, ModelSection, StorageSection, StrategySection


class RunSettings(Config, RunIdentity):
    """All sections that both roles must agree on, not yet held to each other (`rules`)."""

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
    def kind(self) -> RunKind:
        """How the run goes. Nothing else asks the settings for it."""
        if not self.federation.num_rounds:
            return RunKind.OWN_LOOPS
        return RunKind.TURNS if self.federation.strategy == "FedBuff" else RunKind.ROUNDS

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
    def backbone_kind(self) -> BackboneKind:
        """For whom the backbone trains. Nothing else asks the settings for it."""
        is_copied = self.federation.server_mode == "per_client" and self.backbone_trains
        return BackboneKind.COPIES if is_copied else BackboneKind.ONE

    @property
    def bottom_trains(self) -> bool:
        """Whether anything below the first cut trains, so that its gradient must be sent back."""
        return self.train.embeddings or (self.train.bottom != "none" and self.model.bottom_layers > 0)

    def identity(self) -> dict[str, Any]:
        """Return, as nested plain values, what decides the run's weights: with another value it is another run."""
        found = of_class(RunSettings, self._plain(), SettingClass.IDENTITY)
        # with rounds or without is not how many
        found["federation"]["num_rounds"] = "1 or more" if self.federation.num_rounds else 0
        if self.federation.compares_rounds:  # then what is measured decides which round the run ends with
            found["evaluation"] = self._plain()["evaluation"]
            found["federation"]["per_device_eval_batch_size"] = self.federation.per_device_eval_batch_size
        return found

    def exposure(self) -> dict[str, Any]:
        """Return, as nested plain values, what decides what leaves a client: its consent is for these."""
        return of_class(RunSettings, self._plain(), SettingClass.EXPOSURE)

    def operation(self) -> dict[str, Any]:
        """Return, as nested plain values, what may change between two starts of the same run."""
        return of_class(RunSettings, self._plain(), SettingClass.OPERATION)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over identity and exposure: what a client agrees to, as far as it can be agreed to."""
        agreed = {"identity": self.identity(), "exposure": self.exposure()}
        return hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Write the run's settings as one line of JSON with sorted keys."""
        return json.dumps(self._plain(), sort_keys=True)

    def _plain(self) -> dict[str, Any]:
        return self.model_dump(mode="json", include=set(RunSettings.model_fields))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, before, now) of settings that differ in two nested trees of plain values; None is "not there"."""
    for key in sorted(before.keys() | now.keys()):
        then, here, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(then, Mapping) or isinstance(here, Mapping):
            yield from differences(then or {}, here or {}, f"{name}.")
        elif then != here:
            yield name, then, here
