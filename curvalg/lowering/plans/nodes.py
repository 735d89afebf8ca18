"""Plans: what an expression becomes on a problem before any number is computed.

A plan is a small tree. Terms of one sum that share their input share a sweep; a product is one plan after another.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvalg.errors import ConvergenceError, CurvalgWarning, ExpressionError
from curvalg.expr.node import Expr
from curvalg.expr.nodes.arrays import ArrayLeaf
from curvalg.expr.nodes.inverse import Inverse
from curvalg.expr.nodes.roots import SquareRoot
from curvalg.lowering.blocks.output_rows import output_sizes
from curvalg.lowering.blocks.rows import RowRanges, by_blocks
from curvalg.lowering.inverses.offer import Form
from curvalg.lowering.inverses.solver import Solver
from curvalg.lowering.inverses.verified import report
from curvalg.lowering.lines import alike, indent
from curvalg.lowering.matrices import Structure
from curvalg.lowering.matrices import array_leaves as leaves
from curvalg.lowering.sweeps.linearization import Linearization, linearization
from curvalg.lowering.sweeps.sweep import Sweep
from curvalg.problem import Evaluation, Layout, Problem, Snapshot
from curvalg.problem.verification.reverse import Rows, TwiceBackward, reverse_tangents
from curvalg.problem.verification.tangent_checks import TangentNotes
from curvalg.solve import SolveResult
from curvalg.solve.powers import norms
from curvalg.solve.trail import Trail
from curvalg.tensors.backward import backward_columns

Shape = tuple[int, int]


class Plan(ABC):
    """How one operator is applied at a snapshot."""

    @abstractmethod
    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        """The product with x (n, K), shape (m, K)."""

    @abstractmethod
    def lines(self, snapshot: Snapshot) -> list[str]:
        """The plan for people, a line each, nested by indentation."""

    @property
    def inner(self) -> tuple[Plan, ...]:
        """Plans inside this one."""
        return ()

    def dense(self, snapshot: Snapshot) -> Tensor | None:
        """The matrix, where there is a cheaper way than products with unit vectors."""
        return None

    def prepare(self, snapshot: Snapshot) -> None:
        """Make the passes over the data that the first product would make."""
        for part in self.inner:
            part.prepare(snapshot)


def as_float(coefficient: Fraction) -> float:
    """A coefficient as a float.

    Raises:
        ExpressionError: out of a float's range.
    """
    try:
        value = float(coefficient)
    except OverflowError:
        value = math.inf
    if math.isinf(value) or (coefficient and not value):
        raise ExpressionError("a coefficient of the expression is beyond the range of floats")
    return value


@dataclass(frozen=True)
class SweepPlan(Plan):
    """Local terms in one sweep, one column after the other."""

    problem: Problem
    sweep: Sweep
    expr: Expr

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        with snapshot.lock:
            return linearization(self.problem, snapshot, self.sweep).product(self.problem, snapshot, x.T.contiguous()).T

    def prepare(self, snapshot: Snapshot) -> None:
        with snapshot.lock:
            linearization(self.problem, snapshot, self.sweep).prepare(self.problem, snapshot)

    def lines(self, snapshot: Snapshot) -> list[str]:
        kept = linearization(self.problem, snapshot, self.sweep)
        return [f"sweep: {self.expr}", *indent(_how(self.sweep, self.problem, kept))]


def _how(sweep: Sweep, problem: Problem, kept: Linearization) -> list[str]:
    lines = []
    if sweep.curved and sweep.dataset_terms:
        lines.append("recorded: one backward for the tangent, one for the product")
    elif sweep.curved:
        lines.append("recorded: one backward for all terms")
    elif kept.keeping:
        lines.append(f"recorded: tangent by {kept.route}, then one backward")
    else:
        reason = problem.noted(TangentNotes).no_forward_ad
        push = "forward AD" if reason is None else f"two backward passes (no forward AD: {reason})"
        lines.append(f"fresh: tangent by {push}, then one backward, with a model call each")
    if sweep.reduces:
        lines.append(f"a pass before it for the totals of {', '.join(t.label for t in sweep.reduces)}")
    elif sweep.dataset_terms:
        lines.append(f"statistics of {', '.join(t.label for t in sweep.dataset_terms)} prepared in one pass and kept")
    if kept.complete:
        lines.append(f"kept: {len(kept.batches)} batches, {kept.nbytes / 2**20:.3g} MiB; no model call in a product")
    elif kept.keeping:
        lines.append("kept from the first product on, within the budget")
    elif sweep.curved:
        lines.append("fresh: recorded in every product, 1 model call a batch")
    return [*lines, *kept.notes.values()]


def drop_recordings(plan: Plan, snapshot: Snapshot) -> None:
    """Release what the sweeps of a plan keep; they record anew if they are needed."""
    if isinstance(plan, SweepPlan):
        linearization(plan.problem, snapshot, plan.sweep).drop()
    for part in plan.inner:
        drop_recordings(part, snapshot)


def count_sweeps(plan: Plan) -> int:
    """How many passes over the recordings one product of a plan takes."""
    return isinstance(plan, SweepPlan) + sum(map(count_sweeps, plan.inner))


@dataclass(frozen=True)
class SumPlan(Plan):
    """Several plans with one input, and a multiple of the identity."""

    parts: tuple[tuple[float, Plan], ...]
    shift: float

    @property
    def inner(self) -> tuple[Plan, ...]:
        return tuple(part for _, part in self.parts)

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        if not self.parts:
            return self.shift * x
        (coefficient, first), *rest = self.parts
        total = coefficient * first.apply(snapshot, x) if coefficient != 1 else first.apply(snapshot, x)
        for coefficient, part in rest:
            total = total.add_(part.apply(snapshot, x), alpha=coefficient)
        return total.add_(x, alpha=self.shift) if self.shift else total

    def lines(self, snapshot: Snapshot) -> list[str]:
        lines = ["sum"]
        for coefficient, part in self.parts:
            head, *tail = part.lines(snapshot)
            lines += indent([head if coefficient == 1 else f"{coefficient:g} * {head}", *tail])
        return [*lines, f"  {self.shift:g} * identity"] if self.shift else lines


@dataclass(frozen=True)
class ProductPlan(Plan):
    """Plans applied from right to left."""

    factors: tuple[Plan, ...]

    @property
    def inner(self) -> tuple[Plan, ...]:
        return self.factors

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = factor.apply(snapshot, x)
        return x

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [
            "product, from the last to the first",
            *(line for f in self.factors for line in indent(f.lines(snapshot))),
        ]


@dataclass(frozen=True)
class LeafPlan(Plan):
    """An array leaf or its transpose."""

    leaf: ArrayLeaf
    transpose: bool = False

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        return leaves.multiply(self.leaf, x, self.transpose)

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [f"arrays: {self.leaf}{'.T' if self.transpose else ''}"]


AT_A_TIME = 64
"""Columns of an explicit Jacobian that are taken together."""


def _pushed(route: TwiceBackward | Rows, layout: Layout, x: Tensor) -> Tensor:
    """J X by a recorded route, (outputs, K)."""
    return torch.stack([route.push(layout.tangents(v)).reshape(-1).to(x.dtype) for v in x.unbind(1)], 1)


@dataclass(frozen=True)
class OutputPlan(Plan):
    """The Jacobian, its transpose, or the loss Hessian: a side in output space, rows in the order of the data."""

    problem: Problem
    kind: Literal["jacobian", "jacobian.T", "loss_hessian"]

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        with snapshot.lock:
            if self.kind == "jacobian":
                return torch.cat([self._push(e, x) for e in self._evaluations(snapshot)])
            parts = zip(self._evaluations(snapshot), x.split(output_sizes(self.problem, snapshot)), strict=True)
            if self.kind == "loss_hessian":
                return torch.cat([self._curve(evaluation, t) for evaluation, t in parts])
            total = self.problem.sum()
            for evaluation, u in parts:
                total.add(self._pull(*evaluation.record()[:2], u))
            return total.value  # type: ignore[no-any-return]

    def dense(self, snapshot: Snapshot) -> Tensor | None:
        """J or Jᵀ by as many backward passes as a batch has outputs, or as there are parameters, whichever are fewer."""
        if self.kind == "loss_hessian":
            return None
        rows, problem = [], self.problem
        with snapshot.lock:
            for evaluation in self._evaluations(snapshot):
                z, leaves, _ = evaluation.record()
                count, size = z.numel(), problem.size
                eye = torch.eye(min(count, size), dtype=problem.dtype, device=problem.device)
                if count <= size:
                    rows.append(torch.cat([self._pull(z, leaves, u) for u in eye.split(AT_A_TIME, 1)], 1).T)
                else:
                    route = reverse_tangents(evaluation, z, leaves)
                    rows.append(torch.cat([_pushed(route, problem.layout, v) for v in eye.split(AT_A_TIME, 1)], 1))
        whole = torch.cat(rows)
        return whole.T if self.kind == "jacobian.T" else whole

    def _push(self, evaluation: Evaluation, x: Tensor) -> Tensor:
        """J X for one batch, by one model call for several columns."""
        if x.shape[1] == 1:
            return evaluation.push(x[:, 0])[1].reshape(-1, 1).to(x.dtype)
        z, leaves, _ = evaluation.record()
        return _pushed(reverse_tangents(evaluation, z, leaves), self.problem.layout, x)

    def _pull(self, z: Tensor, leaves: Sequence[Tensor], u: Tensor) -> Tensor:
        """Jᵀ U for one batch, (D, K)."""
        found, _ = backward_columns(z, leaves, u.T.reshape(-1, *z.shape).to(z.dtype))
        flat = [
            u.new_zeros(u.shape[1], leaf.numel()) if g is None else g.reshape(u.shape[1], leaf.numel())
            for g, leaf in zip(found, leaves, strict=True)
        ]
        return torch.cat([t.to(u.dtype) for t in flat], 1).T

    def _curve(self, evaluation: Evaluation, t: Tensor) -> Tensor:
        """B T for one batch."""
        batch = evaluation.evaluate()
        columns = [batch.loss_hvp(column.reshape(batch.output.shape)).reshape(-1) for column in t.unbind(1)]
        return torch.stack(columns, 1)

    def _evaluations(self, snapshot: Snapshot) -> Iterator[Evaluation]:
        return self.problem.evaluations(snapshot, order_matters=True)

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [f"{self.kind}: one pass over the data, batch by batch"]


@dataclass(frozen=True)
class BlocksPlan(Plan):
    """Blocks over disjoint groups of parameters; what no block covers is zero."""

    blocks: tuple[tuple[RowRanges, Plan, str], ...]

    @property
    def inner(self) -> tuple[Plan, ...]:
        return tuple(part for _, part, _ in self.blocks)

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        rows = [places for places, _, _ in self.blocks]
        return by_blocks(rows, x, lambda i, part: self.blocks[i][1].apply(snapshot, part))

    def lines(self, snapshot: Snapshot) -> list[str]:
        passes = count_sweeps(self)
        cost = f"; about {passes} passes a product" if passes > 1 else ""
        parts = [(label, plan.lines(snapshot)) for _, plan, label in self.blocks]
        return [f"{len(self.blocks)} diagonal blocks, one after the other{cost}", *indent(alike(parts))]


@dataclass(frozen=True)
class SubmatrixPlan(Plan):
    """Rows and columns of a plan on all parameters.

    Args:
        whole: the plan.
        size: number of all parameters.
        places: of those that are kept.
        domain: whether the columns are parameters.
        codomain: whether the rows are.
        label: names of the kept parameters.
    """

    whole: Plan
    size: int
    places: RowRanges
    domain: bool
    codomain: bool
    label: str

    @property
    def inner(self) -> tuple[Plan, ...]:
        return (self.whole,)

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        if self.domain:
            padded = x.new_zeros(self.size, x.shape[1])
            self.places.put(padded, x)
            x = padded
        result = self.whole.apply(snapshot, x)
        return self.places.take(result) if self.codomain else result

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [f"sub-matrix over {self.label}", *indent(self.whole.lines(snapshot))]


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
        self._last: tuple[Snapshot, Tensor, SolveResult] | None = None

    @property
    def last(self) -> SolveResult | None:
        """The report of the last solve; residuals that a product had no need of are computed when asked for."""
        if self._last is None:
            return None
        snapshot, b, result = self._last
        if bool(result.residual.isnan().any()):
            result = replace(result, residual=norms(b - self.matrix.apply(snapshot, result.x)))
            self._last = snapshot, b, result
        return result

    @property
    def inner(self) -> tuple[Plan, ...]:
        return (self.matrix,)

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        if self.checked:
            return self.solve(snapshot, x, None, report=False).x
        with snapshot.lock:
            return self.solver.approximate(self._state(snapshot), x)

    def _state(self, snapshot: Snapshot) -> Any:
        """What the solver prepared at a snapshot."""
        with snapshot.lock:
            if snapshot not in self._states:
                self._states[snapshot] = self.solver.prepare(snapshot)
            return self._states[snapshot]

    def solve(
        self, snapshot: Snapshot, b: Tensor, x0: Tensor | None, trail: Trail | None = None, report: bool = True
    ) -> SolveResult:
        """A⁻¹ B (n, K) with a report per column; with a trail, an interrupted solve returns what it has.

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
        oaths = self.solver.oaths(self._states[snapshot]) if snapshot in self._states else []
        lines = [*self.chain, *report(oaths), *self.matrix.lines(snapshot)]
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


@dataclass(frozen=True)
class Unbound(Plan):
    """A matrix whose arrays need a pass over the data that has not been made yet."""

    expr: Expr

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        raise AssertionError("matrix terms are bound before a product")

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [f"matrix: {self.expr}, accumulated over the data at the first product and kept"]


@dataclass(frozen=True)
class ZeroPlan(Plan):
    """Zero; a rectangular one has the rows of its codomain."""

    problem: Problem
    codomain: str | None

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        rows = {
            None: lambda: x.shape[0],
            "parameters": lambda: self.problem.size,
            "outputs": lambda: sum(output_sizes(self.problem, snapshot)),
        }[self.codomain]()
        return x.new_zeros(rows, x.shape[1])

    def lines(self, snapshot: Snapshot) -> list[str]:
        return ["zero"]
