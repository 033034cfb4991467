"""Names of uploads: in a round a client has one, named like itself; in a buffer it may have several: pure."""

from collections.abc import Mapping

_TURN = "@"  # is in no client's id


def name_in_buffer(client_id: str, first_step: int) -> str:
    """Return the name of the upload of a client's turn."""
    return f"{client_id}{_TURN}{first_step}"


def owner_of(upload: str) -> str:
    """Return the client whose upload has this name."""
    return upload.partition(_TURN)[0]


def by_client(weights: Mapping[str, float]) -> dict[str, float]:
    """Add up by client what the uploads of a merge weighed."""
    summed: dict[str, float] = {}
    for upload, weight in weights.items():
        summed[owner_of(upload)] = summed.get(owner_of(upload), 0) + weight
    return summed
