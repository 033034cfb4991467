"""Where a round begins and ends for one client: rounds that all share, and rounds of each client's own. Pure."""

from typing import Protocol


class RoundRules(Protocol):
    """What both sides of a session ask about rounds. A number is a merge's; 0 is the layers all begin with."""

    def may_begin(self, number: int, first_step: int, local_steps: int) -> bool:
        """Tell whether a round may begin with this step of a client."""
        ...

    def may_end(self, number: int, merge: int) -> bool:
        """Tell whether this merge may end a round."""
        ...

    def begun_with(self, number: int, newest: int) -> int:
        """Return the merge whose layers a client in this round should hold, where `newest` is the last."""
        ...

    def is_unheard_of(self, number: int, held: int) -> bool:
        """Tell whether a client that holds the layers of merge `held` cannot have heard of a round that is open."""
        ...

    @property
    def trains_on(self) -> bool:
        """Whether a client between two rounds may have trained on from layers that are still the newest."""
        ...


class SharedRounds:
    """All clients begin a round with the layers of the merge before it, and end it with its own."""

    trains_on = False

    def may_begin(self, number: int, first_step: int, local_steps: int) -> bool:
        return first_step == (number - 1) * local_steps + 1

    def may_end(self, number: int, merge: int) -> bool:
        return merge == number

    def begun_with(self, number: int, newest: int) -> int:
        return newest

    def is_unheard_of(self, number: int, held: int) -> bool:
        return False


class OwnRounds:
    """A client's round is numbered by the merge after the one it began with, and ends with the newest layers."""

    trains_on = True

    def may_begin(self, number: int, first_step: int, local_steps: int) -> bool:
        return True

    def may_end(self, number: int, merge: int) -> bool:
        return merge >= number - 1

    def begun_with(self, number: int, newest: int) -> int:
        return number - 1

    def is_unheard_of(self, number: int, held: int) -> bool:
        return held < number - 1


SHARED_ROUNDS: RoundRules = SharedRounds()
OWN_ROUNDS: RoundRules = OwnRounds()
