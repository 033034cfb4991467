"""What a run's settings and its cut mean for a session: the bounds that both sides check messages against."""

from torch import nn

from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.session.terms import Terms
from splitfl.training.kinds import shared_parts


def terms_of(run: RunConfig, cut: Cut) -> Terms:
    """Return the terms of every session of a run; both sides compute them from the same settings and config."""
    return shared_parts(run).terms_of(run, cut)


def merged_layers(run: RunConfig, cut: Cut) -> dict[str, nn.Parameter]:
    """Return what trains on the client and is everyone's, in the whole model's order."""
    return shared_parts(run).merged_layers(run, cut)
