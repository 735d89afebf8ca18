"""Interleaved timing: every round times each contestant once, in turn, so that a drifting machine hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.effort import Effort
from benchmarks.peers.base import Run

FAR = 3
"""Times the patience: too far to be run a second time."""


@dataclass(frozen=True)
class Entrant:
    """A contestant of one task.

    Args:
        run: what is timed.
        settles: runs after which its times no longer change.
        difference: how its matrix differs by definition from the first entrant's, if it does.
    """

    run: Run
    settles: int = 2
    difference: str | None = None


def stopwatch(device: str) -> Callable[[Run], tuple[float, Tensor]]:
    """``watch(run) -> (seconds, result)``; on a GPU it waits for what was queued."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def watch(run: Run) -> tuple[float, Tensor]:
        wait()
        start = time.perf_counter()
        result = run()
        wait()
        return time.perf_counter() - start, result

    return watch


def _settle(entrant: Entrant, watch: Callable[[Run], tuple[float, Tensor]], seconds: float) -> float:
    """Run it at least once, until it has settled or the time is over; what a run takes then."""
    spent = [watch(entrant.run)[0]]
    while len(spent) < entrant.settles - 1 and sum(spent) < seconds:
        spent.append(watch(entrant.run)[0])
    return statistics.median(spent)


def race(
    entrants: Mapping[str, Entrant], first: Mapping[str, float], effort: Effort, device: str
) -> dict[str, list[float]]:
    """Seconds of every round, by entrant.

    Args:
        entrants: by label.
        first: seconds of their first runs. One beyond the patience is not warmed up; one far beyond is not run again, and
            this is its time.
        effort: rounds and limits.
        device: "cpu" or "cuda".
    """
    watch = stopwatch(device)
    times = {label: [first[label]] for label in entrants if first[label] > FAR * effort.patience}
    quick = {label: entrant for label, entrant in entrants.items() if label not in times}
    warm: dict[str, float] = {}
    gc.collect()
    for label, entrant in quick.items():
        warm[label] = first[label]
        if first[label] <= effort.patience:
            warm[label] = _settle(entrant, watch, effort.seconds)
    rounds = max(1, min(effort.rounds, int(effort.seconds / max(sum(warm.values()), 1e-9))))
    times |= {label: [] for label in quick}
    order = list(quick)
    for _ in range(rounds):
        for label in order:
            times[label].append(watch(quick[label].run)[0])
        order.reverse()  # nobody always comes after the same neighbour, whose data are in the caches
    return {label: times[label] for label in entrants}
