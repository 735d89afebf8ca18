"""Seconds of a run, waiting for the device where there is one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from curvalg.tensors.devices import synchronize

T = TypeVar("T")


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
