"""What differs between kinds of devices, asked of torch's module for the kind: waiting for them, and the floats they have."""

from __future__ import annotations

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given; a CPU always has."""
    if device.type == "mps":  # there is one, and it cannot be named
        torch.mps.synchronize()
    elif device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize(device)
