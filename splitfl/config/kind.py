"""Kinds of runs and of backbones. A run's settings say once which they are (`RunSettings`); tables have their parts."""

from enum import Enum


class RunKind(Enum):
    """How clients' steps and merges follow each other. A new kind has a member here and a class in each table."""

    ROUNDS = "rounds"
    """All clients share the rounds, and a merge ends each."""
    TURNS = "turns"
    """Each client has rounds of its own, and layers are merged as they come in."""
    OWN_LOOPS = "own loops"
    """All clients are own-loop clients, without rounds and merges."""


class BackboneKind(Enum):
    """For whom the server's blocks train."""

    ONE = "one"
    """For all clients, or for nobody."""
    COPIES = "copies"
    """Each client trains a copy of what trains there."""
