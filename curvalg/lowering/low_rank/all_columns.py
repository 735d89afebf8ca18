"""The columns V of all processes that share a problem: each holds its own, and all get products and the Gram matrix."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from curvalg.expr.term import Term
from curvalg.lowering.low_rank.factor import Chunk, Factor, factor_of
from curvalg.problem import Problem, Snapshot
from curvalg.problem.batch import lazy


class AllColumns:
    """What a :class:`Factor` of all data would be; columns lie process by process, in the order of the data.

    Args:
        own: the columns of the data of this process.
        problem: whose processes these are.
        snapshot: the state.
    """

    def __init__(self, own: Factor, problem: Problem, snapshot: Snapshot) -> None:
        self.own, self._problem, self._snapshot, self._group = own, problem, snapshot, problem.group
        self._gram: Tensor | None = None

    def prepare(self, problem: Problem, snapshot: Snapshot) -> None:
        """Count the columns; keep inputs and deltas of this process if they fit."""
        self.own.prepare(problem, snapshot)
        _ = self._every

    @lazy
    def _every(self) -> list[list[tuple[int, int]]]:
        self.own.prepare(self._problem, self._snapshot)
        return self._group.objects(self.own.sizes)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Pairs (columns per row, rows) of every batch."""
        return [pair for sizes in self._every for pair in sizes]

    @property
    def _starts(self) -> list[int]:
        """The number of the first column of each process, and M."""
        starts = [0]
        for sizes in self._every:
            starts.append(starts[-1] + sum(columns * rows for columns, rows in sizes))
        return starts

    @property
    def size(self) -> int:
        """The number M of columns."""
        return self._starts[-1]

    @lazy
    def owner(self) -> Tensor:
        """The number of the term that each column belongs to (M,)."""
        return self._group.rows(self.own.owner)

    @lazy
    def active(self) -> Tensor:
        """The columns that are not zero (M,)."""
        return self._group.rows(self.own.active)

    def push(self, problem: Problem, snapshot: Snapshot, x: Tensor) -> Tensor:
        """Products Vᵀ X for X (D, P), shape (M, P)."""
        self.prepare(problem, snapshot)
        self._group.multiplying(x)
        return self._group.rows(self.own.push(problem, snapshot, x))

    def pull(self, problem: Problem, snapshot: Snapshot, y: Tensor) -> Tensor:
        """Products V Y for Y (M, P), shape (D, P)."""
        self.prepare(problem, snapshot)
        self._group.multiplying(y)
        at = self._starts[self._group.rank]
        return self._group.sum(self.own.pull(problem, snapshot, y[at : at + self.own.size]))

    def squares(self, problem: Problem, snapshot: Snapshot, weights: dict[Term, float]) -> Tensor:
        """The diagonal of Σ_t c_t V_t V_tᵀ (D,)."""
        return self._group.sum(self.own.squares(problem, snapshot, weights))

    def gram(self, problem: Problem, snapshot: Snapshot) -> Tensor:
        """The Gram matrix Vᵀ V (M, M), computed once and kept: each process makes the rows of its own columns.

        Inputs and deltas of one process after the other go to all, piece by piece.
        """
        if self._gram is not None:
            return self._gram
        self.prepare(problem, snapshot)
        starts, group = self._starts, self._group
        rows = torch.empty(self.own.size, self.size, dtype=self.own.dtype, device=self.own.device)
        for rank in range(group.size):
            chunks = self.own.walk(problem, snapshot) if rank == group.rank else iter(())
            while (theirs := group.of(rank, _bare(next(chunks, None)))) is not None:
                places = slice(starts[rank] + theirs.start, starts[rank] + theirs.stop)
                for mine in self.own.walk(problem, snapshot):
                    rows[mine.start : mine.stop, places] = mine.gram(theirs)
        whole = group.rows(rows)
        self._gram = (whole + whole.T) / 2  # each half was made by another process
        return self._gram


def _bare(chunk: Chunk | None) -> Chunk | None:
    """A chunk without what can be found again."""
    return None if chunk is None else replace(chunk, _splits={})


def columns_of(problem: Problem, snapshot: Snapshot, terms: tuple[Term, ...]) -> Factor | AllColumns:
    """The columns of some terms over the data of all processes."""
    own = factor_of(problem, snapshot, terms)
    if problem.group.alone:
        return own
    key = terms, tuple(problem.layout.names)
    return problem.cached(snapshot).get("all columns", key, lambda: AllColumns(own, problem, snapshot))
