"""Short measurements, for choices between ways that give the same numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fastest(run: Callable[[], Any]) -> float:
    """Seconds of the faster of two runs after one to warm up."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = run()
        if isinstance(result, Tensor) and result.is_cuda:
            torch.cuda.synchronize(result.device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
