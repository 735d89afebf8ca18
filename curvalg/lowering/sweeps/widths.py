"""Widths: the number of columns that go into one backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from curvalg.lowering.sweeps.chunked import ChunkedRecording
from curvalg.lowering.sweeps.recorder import Recording
from curvalg.lowering.sweeps.recordings import SinglePass, graph_bytes
from curvalg.lowering.sweeps.tangents import Transient
from curvalg.problem import Problem
from curvalg.problem.kept.race import LONG, Candidate, Race
from curvalg.tensors.memory import workspace

MOST_COLUMNS = 64
"""The most columns in one batched backward pass."""
WIDTHS = (2, 4, 16, MOST_COLUMNS)
"""Columns in one batched backward pass that are tried, and the widths of operands from which each is."""
WORSE = 1.2
"""How many times the cost of a column alone says that batching does not pay."""
COLUMN_MEMORY = 2**30
"""Bytes that the intermediates of a batched backward pass may take, by estimate; on a GPU a share of its memory, if more."""
SHARE = 1 / 8


class Widths:
    """The widths of the products of one sweep: as asked for, or measured on the first batch with so many columns.

    Args:
        problem: the problem.
        sweep: what the products are of.
        notes: topic -> what was chosen and why.
    """

    def __init__(self, problem: Problem, sweep: object, notes: dict[str, str]) -> None:
        self.asked: int | None = None
        if problem.columns != "auto":
            self.asked = 1 if problem.columns == "loop" else problem.columns
        self.name = problem.measured.name("columns", sweep)
        self._notes = notes
        self._chosen: dict[int, int] = {}

    @property
    def unmeasured(self) -> int:
        """The columns of totals and rates at a time: unlike the backward passes not measured, so that products repeat."""
        return self.asked or MOST_COLUMNS

    def at_a_time(self, problem: Problem, recorded: Recording, rows: Tensor) -> int:
        """The columns in one backward pass of a product with vectors (K, D)."""
        if self.asked is not None:
            return self.asked
        if rows.shape[0] == 1 or isinstance(recorded, Transient):
            return 1
        width = max(w for w in WIDTHS if w <= rows.shape[0])
        if width not in self._chosen:
            keep, recorded.keep = recorded.keep, True
            try:
                self._chosen[width] = self._choose(problem, recorded, rows, width)
            finally:
                recorded.keep = keep
        return self._chosen[width]

    def _choose(self, problem: Problem, recorded: Recording, rows: Tensor, width: int) -> int:
        """Choose one column, a width, or a quarter of it: as before, or the least cost a column."""

        def run(part: Tensor, chunk: int) -> Tensor:
            if isinstance(recorded, (SinglePass, ChunkedRecording)):
                return recorded.multiply(part, chunk)
            tangent = recorded.tangent(part, chunk)
            return recorded.finish(part, tangent, chunk)

        race: Race[int] = Race(problem.measured, f"{self.name}, from {width}")
        most = workspace(problem.device, SHARE, COLUMN_MEMORY) // max(1, graph_bytes(recorded))
        sizes = [1, *(w for w in (width // 4, width) if 1 < w <= most)]
        known = race.known
        if known is not None and known not in sizes:
            sizes.append(known)
        unlike = functools.cache(lambda: _unlike_single(run, rows))
        chosen = race.run(
            # A run that is not timed and one that is, of each: together about as much as three products.
            {size: Candidate(lambda size=size: run(rows[:size], size), work=size, rounds=1) for size in sizes},  # type: ignore[misc]
            # What was chosen at another state may be wrong at this one.
            differs=None if known is not None and not problem.verify else lambda _: unlike(),
            enough=_is_work,
        )
        if race.declined:
            why = f"from {width} columns on one after the other: {next(iter(race.declined.values()))}"
        elif race.recalled:
            why = f"from {width} columns on {chosen} at a time, as chosen before"
        else:
            shown = ", ".join(f"{size}: {1e3 * seconds:.2g} ms" for size, seconds in race.seconds.items())
            why = f"from {width} columns on {chosen} at a time ({shown} a column, on one batch)"
        self._notes[f"columns {width}"] = why
        return chosen


def _is_work(seconds: Mapping[int, float]) -> bool:
    """Whether work, not calls, takes the time: wider ones are no better, and long to measure."""
    last = next(reversed(list(seconds)))
    return last * seconds[last] > LONG and seconds[last] > WORSE * seconds[1]


def _unlike_single(run: Callable[[Tensor, int], Tensor], rows: Tensor) -> str | None:
    """The reason why columns must not be taken in one pass: what they give differs from one alone."""
    try:
        batched, single = run(rows[:2], 2), run(rows[:1], 1)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    if bool((batched[:1] - single).norm() <= torch.finfo(rows.dtype).eps ** 0.75 * single.norm()):
        return None
    return "a batched product differs from a single one"
