"""The columns of a weighted sum of terms: coefficients and centring of V."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvalg.expr.term import Term
from curvalg.lowering.low_rank.all_columns import AllColumns, columns_of
from curvalg.lowering.low_rank.factor import Factor
from curvalg.lowering.low_rank.factored_sum import in_order
from curvalg.problem import Problem, Snapshot
from curvalg.problem.kept.reads import Reads
from curvalg.tensors.memory import wide, widest


class WeightedFactor:
    """The columns W = V T of a weighted sum of terms, each scaled by the root of its coefficient, some centred.

    A centred term is V (I − 11ᵀ/N) Vᵀ with 1 over its active columns, so its columns are V (I − γ 11ᵀ).

    Args:
        problem: the problem.
        snapshot: the state.
        entries: (positive coefficient, term).
    """

    def __init__(self, problem: Problem, snapshot: Snapshot, entries: Sequence[tuple[float, Term]]) -> None:
        self.entries = in_order(entries)
        self.problem, self.snapshot = problem, snapshot
        self.factor: Factor | AllColumns = columns_of(problem, snapshot, tuple(term for _, term in self.entries))
        self._mixing: tuple[Tensor, list[tuple[Tensor, float]]] | None = None

    def _mix(self) -> tuple[Tensor, list[tuple[Tensor, float]]]:
        """The scale of every column, and (1, γ) of every centred term."""
        if self._mixing is None:
            self.factor.prepare(self.problem, self.snapshot)
            owner, active = self.factor.owner, self.factor.active
            roots = torch.tensor(
                [math.sqrt(c) for c, _ in self.entries], dtype=widest(owner.device), device=owner.device
            )
            centred = []
            for number, (_, term) in enumerate(self.entries):
                if term.centred:
                    ones = wide((owner == number) & active)
                    count = float(ones.sum())
                    if count:
                        root = math.sqrt(max(0.0, 1 - count / self.problem.totals.count))
                        centred.append((ones, (1 - root) / count))
            self._mixing = roots[owner], centred
        return self._mixing

    def reads(self) -> Reads | str:
        """What products read, where inputs and deltas are kept."""
        if isinstance(self.factor, AllColumns):
            return "since processes exchange what they computed"
        if not self.factor.complete:
            return "since layer inputs and deltas are not kept"
        return Reads(tuple(self.factor.chunks), (self.factor,))

    def transform(self, y: Tensor) -> Tensor:
        """Products T Y for Y (M, P); T is symmetric."""
        scale, centred = self._mix()
        for ones, gamma in centred:
            one = ones.to(y.dtype)
            y = y - gamma * torch.outer(one, one @ y)
        return scale.to(y.dtype)[:, None] * y

    def analyse(self, x: Tensor) -> Tensor:
        """Products Wᵀ X for X (D, P), in the problem's precision."""
        own = x.to(self.problem.dtype)
        return self.transform(self.factor.push(self.problem, self.snapshot, own)).to(x.dtype)

    def synthesise(self, y: Tensor) -> Tensor:
        """Products W Y for Y (M, P)."""
        own = self.transform(y).to(self.problem.dtype)
        return self.factor.pull(self.problem, self.snapshot, own).to(y.dtype)

    def gram(self) -> Tensor:
        """The Gram matrix WᵀW (M, M)."""
        gram = self.factor.gram(self.problem, self.snapshot)
        scale, centred = self._mix()
        if not centred and bool((scale == 1).all()):
            return gram
        return self.transform(self.transform(wide(gram)).T).to(gram.dtype)


def weighed(factor: Factor, entries: Sequence[tuple[float, Term]], count: int, y: Tensor) -> Tensor:
    """Products T² Y for Y (groups, M, P), with coefficients of any sign: Σ c V Vᵀ is V T² Vᵀ.

    Args:
        factor: V, of the terms in their order.
        entries: (coefficient, term).
        count: N.
        y: Y.
    """
    for number, (c, term) in enumerate(entries):
        if len(entries) == 1 and c == 1 and not term.centred:
            return y
        mine = (factor.owner == number).to(y.dtype)[:, None]
        if term.centred:
            ones = mine * factor.active.to(y.dtype)[:, None]
            y = y - ones * (ones * y).sum(1, keepdim=True) / count
        y = y * (1 + (c - 1) * mine)
    return y
