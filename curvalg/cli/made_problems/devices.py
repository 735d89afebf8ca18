"""The devices of this machine, and whether one that is named can be used."""

from __future__ import annotations

import torch

from curvalg.errors import ProblemError


def available() -> list[str]:
    """Names of the devices that tensors can be on, the CPU first.

    >>> available()[0]
    'cpu'
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]


def usable(name: str) -> torch.device:
    """The device of a name.

    Raises:
        ProblemError: there is no such device here, or none that has numbers.

    >>> usable("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()  # the meta device makes tensors, which have no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no one kind of error for this
        reason = str(error).strip().split("\n")[0]
        raise ProblemError(
            f"--device {name} cannot be used here ({reason}); there is {', '.join(available())}"
        ) from error
    return device
