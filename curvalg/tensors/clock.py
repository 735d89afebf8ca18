"""Seconds of a run, waiting for the device where there is one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given; a CPU always has."""
    if device.type == "mps":  # there is one, and it cannot be named
        torch.mps.synchronize()
    elif device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize(device)


def timed(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """The seconds of one run, and its result.

    Args:
        run: what is timed.
        device: where it computes. A device runs behind the host: what it was given before does not count, and all of the run
            does.
    """
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result
