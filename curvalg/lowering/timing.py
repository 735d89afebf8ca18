"""Short measurements, for choices between ways that give the same numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LONG = 0.05
"""Seconds of a run above which one is enough: what warming up saves is little of it."""


def fastest(run: Callable[[], Any]) -> float:
    """Seconds of the faster of two runs after one to warm up; of a long run, of the only one."""
    first = _seconds(run)
    return first if first > LONG else min(_seconds(run) for _ in range(2))


ENOUGH = 0.5
"""Seconds of a race after which no further round is run."""


def race(*runs: Callable[[], Any]) -> list[float]:
    """Seconds of the fastest of three runs of each, taken in turn after one to warm up, so that noise hits all alike.

    Where runs are long there are fewer of them: what warming up saves is little then.
    """
    rounds: list[list[float]] = []
    while len(rounds) < 4 and sum(map(sum, rounds)) < ENOUGH:
        rounds.append([_seconds(run) for run in runs])
    return [min(times) for times in zip(*(rounds[1:] or rounds), strict=True)]


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = run()
    if isinstance(result, Tensor) and result.is_cuda:
        torch.cuda.synchronize(result.device)
    return time.perf_counter() - start
