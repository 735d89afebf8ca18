"""Seconds of a run, waiting for the device where there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def timed(run: Callable[[], T]) -> tuple[float, T]:
    """The seconds of one run, and its result."""
    start = time.perf_counter()
    result = run()
    for device in _devices(result):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def _devices(result: Any) -> set[torch.device]:
    parts = result if isinstance(result, Iterable) and not isinstance(result, Tensor) else [result]
    return {t.device for t in parts if isinstance(t, Tensor) and t.is_cuda}
