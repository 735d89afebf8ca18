"""Plans: what an expression becomes on a problem before any number is computed.

A plan is a small tree. Terms of one sum that share their input share a sweep; a product is one plan after another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import singledispatch
from typing import Literal

import torch
from torch import Tensor

from curvalg.errors import ExpressionError, ProblemError, VectorError
from curvalg.expr import algebra as alg
from curvalg.expr.leaves import ArrayLeaf
from curvalg.expr.node import Expr
from curvalg.expr.term import MatrixTerm, Term
from curvalg.expr.terms import Jacobian, LossHessian
from curvalg.lowering import leaves
from curvalg.lowering.linearization import Sweep
from curvalg.lowering.transposed import transposed
from curvalg.problem import Evaluation, Problem, Snapshot
from curvalg.problem import parameters as params_
from curvalg.problem.evaluation import backward

Shape = tuple[int, int]


class Plan(ABC):
    """How one operator is applied at a snapshot."""

    @abstractmethod
    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        """The product with x (n, K), shape (m, K)."""

    @abstractmethod
    def lines(self) -> list[str]:
        """The plan for people, a line each, nested by indentation."""


def as_float(coefficient: Fraction) -> float:
    """A coefficient as a float.

    Raises:
        ExpressionError: out of a float's range.
    """
    try:
        return float(coefficient)
    except OverflowError:
        raise ExpressionError("a coefficient of the expression is larger than any float") from None


def indent(lines: Sequence[str]) -> list[str]:
    """Lines, two spaces further in."""
    return [f"  {line}" for line in lines]


@dataclass(frozen=True)
class SweepPlan(Plan):
    """Local terms in one sweep, one column after the other."""

    problem: Problem
    sweep: Sweep
    expr: Expr

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        return torch.stack([self.sweep.apply(self.problem, snapshot, column) for column in x.unbind(1)], 1)

    def lines(self) -> list[str]:
        sweep = self.sweep
        if sweep.records and sweep.dataset_terms:
            how = "record, one backward for the tangent, one for the product: 1 model call a batch"
        elif sweep.records:
            how = "record, then one backward for all terms: 1 model call a batch"
        else:
            reason = self.problem.no_forward_ad
            push = "forward AD" if reason is None else f"two backward passes (no forward AD: {reason})"
            how = f"tangent by {push}, then one backward: 2 model calls a batch"
        if sweep.reduces:
            how += f"; a pass before it for the totals of {', '.join(t.label for t in sweep.reduces)}"
        elif sweep.dataset_terms:
            how += f"; statistics of {', '.join(t.label for t in sweep.dataset_terms)} prepared in one pass and kept"
        return [f"sweep: {self.expr}", f"  {how}"]


@dataclass(frozen=True)
class SumPlan(Plan):
    """Several plans with one input, and a multiple of the identity."""

    parts: tuple[tuple[float, Plan], ...]
    shift: float
    size: int

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        if not self.parts:
            return self.shift * x
        (coefficient, first), *rest = self.parts
        total = coefficient * first.apply(snapshot, x) if coefficient != 1 else first.apply(snapshot, x)
        for coefficient, part in rest:
            total = total.add_(part.apply(snapshot, x), alpha=coefficient)
        return total.add_(x, alpha=self.shift) if self.shift else total

    def lines(self) -> list[str]:
        lines = ["sum"]
        for coefficient, part in self.parts:
            head, *tail = part.lines()
            lines += indent([head if coefficient == 1 else f"{coefficient:g} * {head}", *tail])
        return [*lines, f"  {self.shift:g} * identity"] if self.shift else lines


@dataclass(frozen=True)
class ProductPlan(Plan):
    """Plans applied from right to left."""

    factors: tuple[Plan, ...]

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = factor.apply(snapshot, x)
        return x

    def lines(self) -> list[str]:
        return ["product, from the last to the first", *(line for f in self.factors for line in indent(f.lines()))]


@dataclass(frozen=True)
class LeafPlan(Plan):
    """An array leaf or its transpose."""

    leaf: ArrayLeaf
    transpose: bool = False

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        return leaves.multiply(self.leaf, x, self.transpose)

    def lines(self) -> list[str]:
        return [f"arrays: {self.leaf}{'.T' if self.transpose else ''}"]


@dataclass(frozen=True)
class OutputPlan(Plan):
    """The Jacobian, its transpose, or the loss Hessian: a side in output space, rows in the order of the data."""

    problem: Problem
    kind: Literal["jacobian", "jacobian.T", "loss_hessian"]

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        return torch.stack([self._column(snapshot, column) for column in x.unbind(1)], 1)

    def _column(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        if self.kind == "jacobian":
            return torch.cat([e.push(x)[1].reshape(-1).to(x.dtype) for e in self._evaluations(snapshot)])
        parts = zip(self._evaluations(snapshot), x.split(output_sizes(self.problem, snapshot)), strict=True)
        if self.kind == "jacobian.T":
            total = torch.zeros(self.problem.size, dtype=self.problem.dtype, device=self.problem.device)
            for evaluation, u in parts:
                z, params, _ = evaluation.record()
                total += evaluation.gather(backward([z], params, [u.reshape(z.shape)]))
            return total
        products = []
        for evaluation, t in parts:
            batch = evaluation.evaluate()
            products.append(batch.loss_hvp(t.reshape(batch.output.shape)).reshape(-1))
        return torch.cat(products)

    def _evaluations(self, snapshot: Snapshot) -> Iterator[Evaluation]:
        return self.problem.evaluations(snapshot, order_matters=True)

    def lines(self) -> list[str]:
        return [f"{self.kind}: one pass over the data, batch by batch"]


def output_sizes(problem: Problem, snapshot: Snapshot) -> list[int]:
    """Number of outputs of every batch, by one pass of the model; kept.

    Raises:
        ProblemError: the data come in random order, so that rows of output space have no meaning.
    """
    if not problem.data.ordered:
        raise ProblemError(
            "outputs are rows in the order of the data, but the loader shuffles; pass shuffle=False, or list(loader)"
        )
    kept = problem.kept(snapshot)
    if "output sizes" not in kept:
        with problem.differentiating(), torch.no_grad():
            evaluations = problem.evaluations(snapshot, order_matters=True)
            kept["output sizes"] = [e.run(e.values())[0].numel() for e in evaluations]
    return list(kept["output sizes"])


@dataclass(frozen=True)
class BlocksPlan(Plan):
    """Blocks over disjoint groups of parameters; what no block covers is zero."""

    blocks: tuple[tuple[Tensor, Plan, str], ...]

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for positions, plan, _ in self.blocks:
            result[positions] = plan.apply(snapshot, x[positions])
        return result

    def lines(self) -> list[str]:
        lines = [f"{len(self.blocks)} diagonal blocks, each with passes of its own"]
        for _, plan, label in self.blocks:
            lines += indent([f"over {label}:", *indent(plan.lines())])
        return lines


@dataclass(frozen=True)
class Unbound(Plan):
    """A matrix whose arrays need a pass over the data that has not been made yet."""

    expr: Expr

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        raise AssertionError("matrix terms are bound before a product")

    def lines(self) -> list[str]:
        return [f"matrix: {self.expr}, accumulated over the data at the first product and kept"]


# -- from expressions to plans --------------------------------------------------------------------------------------------


@singledispatch
def plan(expr: Expr, problem: Problem, size: int) -> Plan:
    """The plan of a simplified expression on a problem.

    Args:
        expr: an expression.
        problem: the problem, restricted already where the expression is inside a restriction.
        size: dimension for what has no size of its own.

    Raises:
        ExpressionError: a node that cannot be lowered.
    """
    raise ExpressionError(f"{type(expr).__name__} cannot be lowered: no plan is registered for it ({expr})")


@plan.register
def _(expr: alg.IdentityExpr, problem: Problem, size: int) -> Plan:
    return SumPlan((), 1.0, size)


@plan.register
def _(expr: alg.ZeroExpr, problem: Problem, size: int) -> Plan:
    return ZeroPlan()


@dataclass(frozen=True)
class ZeroPlan(Plan):
    """Zero on one space."""

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def lines(self) -> list[str]:
        return ["zero"]


@plan.register
def _(expr: Term, problem: Problem, size: int) -> Plan:
    expr.validate(problem.facts)
    return SweepPlan(problem, Sweep(((1.0, expr),)), expr)


@plan.register
def _(expr: MatrixTerm, problem: Problem, size: int) -> Plan:
    expr.validate(problem.facts)
    return Unbound(expr)


@plan.register
def _(expr: ArrayLeaf, problem: Problem, size: int) -> Plan:
    if expr.size != problem.size:
        raise VectorError(f"{expr} is {expr.size} x {expr.size}, but the problem has {problem.size} parameters")
    return LeafPlan(expr)


@plan.register
def _(expr: Jacobian, problem: Problem, size: int) -> Plan:
    expr.validate(problem.facts)
    return OutputPlan(problem, "jacobian")


@plan.register
def _(expr: LossHessian, problem: Problem, size: int) -> Plan:
    expr.validate(problem.facts)
    return OutputPlan(problem, "loss_hessian")


@plan.register
def _(expr: alg.Transpose, problem: Problem, size: int) -> Plan:
    inner = expr.expr
    if isinstance(inner, Jacobian):
        return OutputPlan(problem, "jacobian.T")
    if isinstance(inner, ArrayLeaf):
        plan(inner, problem, size)
        return LeafPlan(inner, transpose=True)
    if isinstance(inner, Term):
        inner.validate(problem.facts)
        return SweepPlan(problem, Sweep(((1.0, transposed(inner)),)), expr)
    if isinstance(inner, MatrixTerm):
        inner.validate(problem.facts)
        return Unbound(expr)
    raise ExpressionError(f"the transpose of {type(inner).__name__} cannot be lowered ({expr})")


@plan.register
def _(expr: alg.Product, problem: Problem, size: int) -> Plan:
    return ProductPlan(tuple(plan(factor, problem, size) for factor in expr.factors))


@plan.register
def _(expr: alg.Sum, problem: Problem, size: int) -> Plan:
    sweeps: dict[Problem, list[tuple[float, Term]]] = {}
    fused: dict[Problem, list[tuple[Expr, Fraction]]] = {}
    parts: list[tuple[float, Plan]] = []
    for child, coefficient in _by_last_factor(expr.coefficients).items():
        part = plan(child, problem, size)
        if isinstance(part, SweepPlan):  # a restricted term runs on a problem of its own
            entries = [(as_float(coefficient) * c, term) for c, term in part.sweep.entries]
            sweeps.setdefault(part.problem, []).extend(entries)
            fused.setdefault(part.problem, []).append((child, coefficient))
        else:
            parts.append((as_float(coefficient), part))
    joint = [SweepPlan(on, Sweep(tuple(entries)), alg.add(fused[on])) for on, entries in sweeps.items()]
    parts = [*((1.0, sweep) for sweep in joint), *parts]
    if len(parts) == 1 and parts[0][0] == 1 and not expr.shift:
        return parts[0][1]
    return SumPlan(tuple(parts), as_float(expr.shift), size)


def _by_last_factor(coefficients: Mapping[Expr, Fraction]) -> dict[Expr, Fraction]:
    """A @ C + B @ C as (A + B) @ C: products with one last factor share its result, and so one input."""
    groups: dict[Expr, list[tuple[Expr, Fraction]]] = {}
    result: dict[Expr, Fraction] = {}
    for child, c in coefficients.items():
        if isinstance(child, alg.Product):
            groups.setdefault(child.factors[-1], []).append((alg.multiply(child.factors[:-1]), c))
        else:
            result[child] = c
    for last, heads in groups.items():
        joint = alg.add(heads) if len(heads) > 1 else heads[0][0]
        combined = alg.multiply([joint, last])
        scale = Fraction(1) if len(heads) > 1 else heads[0][1]
        for part, c in combined.coefficients.items() if isinstance(combined, alg.Sum) else [(combined, Fraction(1))]:
            result[part] = result.get(part, Fraction(0)) + scale * c
    return result


@plan.register
def _(expr: alg.Restriction, problem: Problem, size: int) -> Plan:
    restricted = problem.restricted(expr.params)
    return plan(expr.expr, restricted, restricted.size)


@plan.register
def _(expr: alg.BlockDiagonal, problem: Problem, size: int) -> Plan:
    if isinstance(expr.what, Expr):
        blocks = [alg.Block(group, expr.what) for group in partition(expr.by, problem)]
    else:
        blocks = list(expr.what)
    seen: dict[str, str] = {}
    plans = []
    for block in blocks:
        if block.joint:
            raise ExpressionError(
                "blocks in the joint [W | b] layout cannot be lowered; lay the parameters one after another"
            )
        names = params_.match(block.params, problem.layout.names)
        label = ", ".join(block.params)
        for name in names:
            if name in seen:
                raise ExpressionError(
                    f"blocks must not overlap, but {name!r} is in those of {seen[name]!r} and {label!r}"
                )
            seen[name] = label
        flat = torch.arange(problem.size, device=problem.device)
        positions = torch.cat([flat[problem.layout.slices[name]] for name in names])
        restricted = problem.restricted(block.params)
        plans.append((positions, plan(block.expr, restricted, restricted.size), label))
    return BlocksPlan(tuple(plans))


def partition(by: alg.Partition | None, problem: Problem) -> list[tuple[str, ...]]:
    """Groups of parameter names."""
    names = problem.layout.names
    if by == "parameter":
        return [(name,) for name in names]
    if by == "module":
        owners: dict[str, list[str]] = {}
        for name in names:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        return [tuple(group) for group in owners.values()]
    return [group for group in by or () if isinstance(group, tuple)]
