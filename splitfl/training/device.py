"""Where tensors compute, through torch's own device names."""

import torch

from splitfl.errors import ConfigError


def open_device(name: str, setting: str) -> torch.device:
    """Return the device, or raise `ConfigError` naming the setting when torch cannot use it here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for the device
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{setting} = {name!r} cannot be used here; write cpu, cuda, cuda:1 or mps: {reason[:120]}"
        ) from None
    return device
