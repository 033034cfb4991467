"""What a tensor on the wire is for: its role decides how it travels (`protocol.tensors`), as agreed in the terms."""

from enum import Enum


class Role(Enum):
    """The closed list of tensors that cross; bytes of files are no tensors."""

    HIDDEN = "hidden states"
    """Activations at a cut, forward: `Forward` and its answer."""
    NEW_POSITIONS = "hidden states of new positions"
    """Activations of a generation, for which the server keeps a cache: `Decode` and its answer."""
    GRADIENT = "gradients of hidden states"
    """Backward: `Backward` and its answer."""
    NORMS = "norms of gradients"
    """A norm for each tensor that trains on one side: in `Commit`, and in `BackwardDone` of an own loop."""
    LAYER = "layers"
    """What trains on the client and is merged, each tensor in a type of its own: `Upload`, `Merged` and others."""
    CONTROL = "controls"
    """Control variates of SCAFFOLD, after the layers that a server sends."""
