"""Block-diagonal products from kept layer inputs and output deltas."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from curvalg.expr.term import Term
from curvalg.lowering.factors import Factor, Groups, factor_of
from curvalg.lowering.plan import Plan, drop_recordings
from curvalg.lowering.timing import race
from curvalg.problem import Problem, Snapshot


class FactoredBlocksPlan(Plan):
    """Blocks of one sum of terms with few output directions: from kept layer inputs and output deltas, all in one go.

    A product costs two matrix products a layer, whatever the number of blocks.

    Args:
        problem: over the parameters of all these blocks.
        entries: (coefficient, term).
        groups: the parameters of each block.
        shifts: multiple of the identity in each block.
        otherwise: the same blocks in the ordinary way, for when inputs and deltas do not fit the budget.
    """

    def __init__(
        self,
        problem: Problem,
        entries: Sequence[tuple[float, Term]],
        groups: Groups,
        shifts: Sequence[float],
        otherwise: Plan,
    ) -> None:
        self.problem, self.entries, self.groups, self.shifts = problem, tuple(entries), groups, tuple(shifts)
        self.otherwise = otherwise
        self._choices: WeakKeyDictionary[Snapshot, dict[str, float]] = WeakKeyDictionary()

    @property
    def inner(self) -> tuple[Plan, ...]:
        return (self.otherwise,)

    def _factor(self, snapshot: Snapshot) -> Factor:
        return factor_of(self.problem, snapshot, tuple(term for _, term in self.entries))

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        factor = self._factor(snapshot)
        if snapshot in self._choices and self._slower(snapshot):
            return self.otherwise.apply(snapshot, x)
        factor.prepare(self.problem, snapshot)
        if not factor.complete:
            return self.otherwise.apply(snapshot, x)
        if snapshot not in self._choices:
            self._choices[snapshot] = self._recalled() or self._measure(factor, snapshot, x[:, :1])
            self.problem.choices[self._name] = self._choices[snapshot]
            if self._slower(snapshot):
                factor.drop()
                return self.otherwise.apply(snapshot, x)
            drop_recordings(self.otherwise, snapshot)
        return self._factored(factor, x)

    @property
    def _name(self) -> str:
        terms = " + ".join(sorted(f"{c:g}*{term}" for c, term in self.entries))
        return self.problem.choice("seconds of blocks", f"{terms} by {len(self.groups)} groups")

    def _recalled(self) -> dict[str, float] | None:
        """What an earlier run measured."""
        return self.problem.recalled.get(self._name)

    def _measure(self, factor: Factor, snapshot: Snapshot, x: Tensor) -> dict[str, float]:
        """Seconds of a product in either way; with many output directions or positions the deltas can be the larger."""
        seconds = race(lambda: self._factored(factor, x), lambda: self.otherwise.apply(snapshot, x))
        return dict(zip(("factored", "one after the other"), seconds, strict=True))

    def _slower(self, snapshot: Snapshot) -> bool:
        seconds = self._choices[snapshot]
        return seconds["factored"] > seconds["one after the other"]

    def _factored(self, factor: Factor, x: Tensor) -> Tensor:
        layout = self.problem.layout
        result = factor.pull_groups(
            layout, self.groups, self._weigh(factor, factor.push_groups(layout, self.groups, x))
        )
        for names, shift in zip(self.groups, self.shifts, strict=True):
            if shift:
                for name in names:
                    result[layout.slices[name]].add_(x[layout.slices[name]], alpha=shift)
        return result

    def _weigh(self, factor: Factor, y: Tensor) -> Tensor:
        """Coefficients and centring of every term's columns, for Y (groups, M, P)."""
        for number, (c, term) in enumerate(self.entries):
            if len(self.entries) == 1 and c == 1 and not term.centred:
                return y
            mine = (factor.owner == number).to(y.dtype)[:, None]
            if term.centred:
                ones = mine * factor.active.to(y.dtype)[:, None]
                y = y - ones * (ones * y).sum(1, keepdim=True) / self.problem.totals.count
            y = y * (1 + (c - 1) * mine)
        return y

    def lines(self, snapshot: Snapshot) -> list[str]:
        factor, count = self._factor(snapshot), len(self.groups)
        measured = self._choices.get(snapshot, {})
        shown = ", ".join(f"{way} {1e3 * seconds:.2g} ms" for way, seconds in measured.items())
        if self.problem.budget.limit in (0, factor.refused) or (measured and self._slower(snapshot)):
            return [*self.otherwise.lines(snapshot), *([f"  measured: {shown}"] if shown else [])]
        total = " + ".join(str(term) if c == 1 else f"{c:g} * {term}" for c, term in self.entries)
        lines = [
            f"{count} diagonal blocks of {total}, factored",
            "  two matrix products a layer for all blocks together",
        ]
        kept = (
            f"kept: {factor.nbytes / 2**20:.3g} MiB"
            if factor.complete
            else "kept from the first product on, if they fit"
        )
        return [*lines, f"  layer inputs and output deltas {kept}", *([f"  measured: {shown}"] if shown else [])]
