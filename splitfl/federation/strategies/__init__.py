"""The strategies, by the names that the config knows them by."""

from splitfl.config.identity import StrategyName
from splitfl.config.sections import FederationSection, StrategySection
from splitfl.federation.strategies.adaptive import FedAdagrad, FedAdam, FedYogi
from splitfl.federation.strategies.fed_avg import FedAvg, FedProx
from splitfl.federation.strategies.fed_avg_m import FedAvgM
from splitfl.federation.strategies.fed_buff import FedBuff
from splitfl.federation.strategies.krum import Krum, MultiKrum
from splitfl.federation.strategies.median import FedMedian
from splitfl.federation.strategies.norm_clipped_mean import NormClippedMean
from splitfl.federation.strategies.scaffold import SCAFFOLD
from splitfl.federation.strategies.trimmed_mean import FedTrimmedAvg
from splitfl.federation.strategy import Strategy

STRATEGIES: dict[StrategyName, type[Strategy]] = {
    "FedAvg": FedAvg,
    "FedProx": FedProx,
    "SCAFFOLD": SCAFFOLD,
    "FedAvgM": FedAvgM,
    "FedBuff": FedBuff,
    "FedAdagrad": FedAdagrad,
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "FedMedian": FedMedian,
    "FedTrimmedAvg": FedTrimmedAvg,
    "Krum": Krum,
    "MultiKrum": MultiKrum,
    "NormClippedMean": NormClippedMean,
}


def strategy_for(federation: FederationSection, options: StrategySection, seed: int) -> Strategy:
    """Return the strategy that the config names."""
    return STRATEGIES[federation.strategy](federation, options, seed)
