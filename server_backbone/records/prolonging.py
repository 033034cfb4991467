"""Whether a run that stands somewhere in its log goes on with the rounds that its settings say now."""

from server_backbone.records.state import RunState
from splitfl.config.sections import FederationSection


def objection_to_rounds(state: RunState, federation: FederationSection, *, is_raised: bool) -> str:
    """Say why a run that stands here cannot have as many rounds as these settings say, "" when it can.

    `is_raised` says that they are more than it had.
    """
    if not federation.num_rounds:
        return ""
    is_open = state.round is not None or bool(state.turns)
    fewest = state.num_merged + is_open
    if federation.num_rounds < fewest:
        opened = f" and round {fewest} is open" if is_open else ""
        return (
            f"federation.num_rounds = {federation.num_rounds}, but {state.num_merged} rounds are merged{opened}: set it"
            f" to {fewest} or more"
        )
    if not is_raised or not state.has_ended:
        return ""
    if state.end_reason:
        return f"the run was stopped early, and more rounds would change nothing: {state.end_reason}"
    if federation.load_best_model_at_end:
        return (
            "the run has ended with the layers of its best round (federation.load_best_model_at_end), so there is no"
            " last round to go on from: begin another run, with the exported model if you like"
        )
    return ""


def has_more_to_do(state: RunState, num_rounds: int, *, is_raised: bool) -> bool:
    """Tell whether clients that had done their part, or rounds that had ended, go on."""
    if state.has_ended:
        return is_raised
    return state.num_merged < num_rounds and any(member.has_finished for member in state.members.values())
