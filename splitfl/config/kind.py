"""The kinds of runs. Which one a run is, its settings say once (`RunSettings.kind`); each role has a table of parts."""

from enum import Enum


class RunKind(Enum):
    """How clients' steps and merges follow each other. A new kind has a member here and a class in each table."""

    ROUNDS = "rounds"
    """All clients share the rounds, and a merge ends each."""
    TURNS = "turns"
    """Each client has rounds of its own, and layers are merged as they come in."""
    OWN_LOOPS = "own loops"
    """Each client trains in a loop of its own, without rounds and merges."""
