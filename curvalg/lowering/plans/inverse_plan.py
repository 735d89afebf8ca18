"""Solves with the matrix of another plan, and square roots."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvalg.errors import ConvergenceError, CurvalgWarning
from curvalg.expr.nodes.inverse import Inverse
from curvalg.expr.nodes.roots import SquareRoot
from curvalg.lowering.inverses.offer import Form
from curvalg.lowering.inverses.solver import Solver
from curvalg.lowering.inverses.verified import report
from curvalg.lowering.lines import indent
from curvalg.lowering.matrices import Structure
from curvalg.lowering.plans.plan import Plan
from curvalg.problem import Snapshot
from curvalg.problem.kept.reads import Reads
from curvalg.solve import SolveResult
from curvalg.solve.powers import norms
from curvalg.solve.trail import Trail


class InversePlan(Plan):
    """A solve with the matrix of another plan.

    Args:
        expr: the inverse, with its options.
        solver: that accepted.
        chain: what every solver said.
        matrix: the plan of the matrix.
    """

    def __init__(self, expr: Inverse, solver: Solver[Any], chain: tuple[str, ...], matrix: Plan) -> None:
        self.expr, self.solver, self.chain, self.matrix = expr, solver, chain, matrix
        self._states: WeakKeyDictionary[Snapshot, Any] = WeakKeyDictionary()
        self.checked = True
        """Whether a product is checked against its residual; a preconditioner's is not."""
        self._last: tuple[Snapshot, Tensor, SolveResult | None] | None = None

    @property
    def last(self) -> SolveResult | None:
        """The report of the last solve; residuals that a product had no need of are computed when asked for."""
        if self._last is None:
            return None
        snapshot, b, result = self._last
        if result is None:
            result = self.solver.solve(self._state(snapshot), b, None, report=False)
        if bool(result.residual.isnan().any()):
            result = replace(result, residual=norms(b - self.matrix.apply(snapshot, result.x)))
        self._last = snapshot, b, result
        return result

    @property
    def inner(self) -> tuple[Plan, ...]:
        return (self.matrix,)

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        state = self._state(snapshot)
        with nullcontext() if self.checked and self.solver.iterative else snapshot.lock:
            if not self.checked:
                return self.solver.approximate(state, x)
            if self.solver.trusts(state):
                self._last = snapshot, x.clone(), None  # the caller may write into its operand
                return self.solver.apply(state, x)
        return self.solve(snapshot, x, None, report=False).x

    def reads(self, snapshot: Snapshot, columns: int) -> Reads | str:
        state = self._states.get(snapshot)
        if state is None or not self.checked or not self.solver.trusts(state):
            return "since solves look at their residuals"
        return self.solver.reads(state)

    def blame(self) -> None:
        """Say why the last product was not finite, if it is this plan's fault; looked at only then.

        Raises:
            ConvergenceError: it is.
        """
        if self._last is not None and self._last[2] is None:
            snapshot, b, _ = self._last
            self.solve(snapshot, b, None, report=False)

    def _state(self, snapshot: Snapshot) -> Any:
        """The state that the solver prepared at a snapshot."""
        with snapshot.lock:
            if snapshot not in self._states:
                self._states[snapshot] = self.solver.prepare(snapshot)
            return self._states[snapshot]

    def solve(
        self, snapshot: Snapshot, b: Tensor, x0: Tensor | None, trail: Trail | None = None, report: bool = True
    ) -> SolveResult:
        """Solve A X = B (n, K) with a report per column; with a trail, an interrupted solve returns what it has.

        Raises:
            ConvergenceError: a column did not reach the tolerance; carries the result with the best iterates.
        """
        with nullcontext() if self.solver.iterative else snapshot.lock:
            result = self.solver.solve(self._state(snapshot), b, x0, trail, report)
        self._last = snapshot, b, result
        if not result.ok and not result.partial:
            message = (
                f"{self.solver.name} did not solve {self.expr.expr}: {result.summary()}. Raise maxiter= or rtol=, add damping "
                "or a preconditioner, or pass on_fail='warn' to accept the best iterate"
            )
            if self.expr.on_fail == "raise":
                raise ConvergenceError(message, result)
            warnings.warn(message, CurvalgWarning, stacklevel=2)
        return result

    def lines(self, snapshot: Snapshot) -> list[str]:
        state = self._states.get(snapshot)
        oaths, matrix = ([], None) if state is None else (self.solver.oaths(state), self.solver.multiplies(state))
        lines = [*self.chain, *report(oaths), *(matrix or self.matrix).lines(snapshot)]
        return [f"inverse by {self.solver.name}", *indent(lines)]


class RootPlan(Plan):
    """The square root of a structured matrix.

    Args:
        expr: the root.
        form: of the matrix inside.
        chain: what the forms before it said.
    """

    def __init__(self, expr: SquareRoot, form: Form, chain: tuple[str, ...]) -> None:
        self.expr, self.form, self.chain = expr, form, chain
        self._roots: WeakKeyDictionary[Snapshot, Structure] = WeakKeyDictionary()

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        with snapshot.lock:
            if snapshot not in self._roots:
                root = self.form.at(snapshot).mapped(torch.sqrt, "sqrt")
                assert root is not None
                self._roots[snapshot] = root
            return self._roots[snapshot].multiply(x)

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [
            f"square root by {self.form.name}",
            *indent([*self.chain, f"{self.form.name}: chosen, {self.form.cost}", f"of {self.expr.expr}"]),
        ]
