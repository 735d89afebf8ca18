"""Short measurements, for choices between ways that give the same numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LONG = 0.05
"""Seconds of a run above which one is enough: what warming up saves is little of it."""


def fastest(run: Callable[[], Any]) -> float:
    """Seconds of the faster of two runs after one to warm up; of a long run, of the only one."""
    first = timed(run)
    return first if first > LONG else min(timed(run) for _ in range(2))


ENOUGH = 0.5
"""Seconds after which no further round of a race is run."""


def race(*runs: Callable[[], Any]) -> list[float]:
    """Seconds of the fastest of four runs of each, two at a time in turn, so that a drift hits all alike.

    Every turn begins with a run that is not timed: it makes again what another has pushed out of a memory that is too small
    for both. Where runs are long there are fewer of them.
    """
    best, begin = [math.inf] * len(runs), time.perf_counter()
    for _ in range(2):
        for number, run in enumerate(runs):
            again = 1 if timed(run) > LONG else 2
            best[number] = min(best[number], *(timed(run) for _ in range(again)))
        if time.perf_counter() - begin > ENOUGH:
            break
    return best


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    result = run()
    if isinstance(result, Tensor) and result.is_cuda:
        torch.cuda.synchronize(result.device)
    return time.perf_counter() - start
