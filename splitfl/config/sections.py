"""Sections of a run's file whose settings are of several classes, put together; what holds within such a section."""

from collections.abc import Mapping
from typing import ClassVar, Self, get_args

from pydantic import ConfigDict, model_validator

from splitfl.config.exposure import FederationExposure
from splitfl.config.identity import (
    FederationIdentity,
    ModelIdentity,
    StorageIdentity,
    StrategyIdentity,
    StrategyName,
)
from splitfl.config.operation import FederationOperation, ModelOperation, StorageOperation, StrategyOperation


class ModelSection(ModelIdentity, ModelOperation):
    """Which model is trained and where it is cut."""


class FederationSection(FederationOperation, FederationExposure, FederationIdentity):
    """Rounds, who takes part in them, and how the backbone and the merges treat several clients."""

    @model_validator(mode="after")
    def _clients_add_up(self) -> Self:
        if self.min_train_clients > self.min_available_clients:
            raise ValueError(
                f"min_train_clients ({self.min_train_clients}) must not exceed min_available_clients"
                f" ({self.min_available_clients})"
            )
        return self

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
                "num_rounds = 0 is for own-loop clients, which share no steps: set server_mode to"
                ' "sequential", "per_client" or "frozen"'
            )
        return self


class StrategySection(StrategyOperation, StrategyIdentity):
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

    def unused_by(self, strategy: StrategyName) -> list[str]:
        """Name the options that differ from their default and that the strategy does not use."""
        return [
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default and strategy not in self.USED_BY[name]
        ]


class StorageSection(StorageOperation, StorageIdentity):
    """What both sides keep on disk so that no acknowledged step is lost."""
