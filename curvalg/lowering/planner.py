"""From expressions to plans: one rule per kind of node."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import singledispatch

import torch

import curvalg.expr as alg
from curvalg.errors import ExpressionError, VectorError
from curvalg.expr.leaves import ArrayLeaf
from curvalg.expr.node import Expr
from curvalg.expr.term import MatrixTerm, Term
from curvalg.expr.terms import Jacobian, LossHessian
from curvalg.lowering.plan import (
    BlocksPlan,
    LeafPlan,
    OutputPlan,
    Plan,
    ProductPlan,
    SumPlan,
    SweepPlan,
    Unbound,
    ZeroPlan,
    as_float,
)
from curvalg.lowering.sweep import Sweep
from curvalg.lowering.transposed import transposed
from curvalg.problem import Problem
from curvalg.problem import parameters as params_


@singledispatch
def plan(expr: Expr, problem: Problem) -> Plan:
    """The plan of a simplified expression on a problem.

    Args:
        expr: an expression.
        problem: the problem, restricted already where the expression is inside a restriction.

    Raises:
        ExpressionError: a node that cannot be lowered.
    """
    raise ExpressionError(f"{expr} cannot be lowered: there is no rule for {type(expr).__name__}")


@plan.register
def _(expr: alg.Inverse, problem: Problem) -> Plan:
    raise ExpressionError(
        f"{expr} can be written and simplified, but this version cannot be lowered to a solver; lower {expr.expr} and "
        "hand it to scipy.sparse.linalg.cg or minres"
    )


@plan.register
def _(expr: alg.IdentityExpr, problem: Problem) -> Plan:
    return SumPlan((), 1.0)


@plan.register
def _(expr: alg.ZeroExpr, problem: Problem) -> Plan:
    return ZeroPlan(problem, expr.codomain)


@plan.register
def _(expr: Term, problem: Problem) -> Plan:
    expr.validate(problem.facts)
    return SweepPlan(problem, Sweep(((1.0, expr),)), expr)


@plan.register
def _(expr: MatrixTerm, problem: Problem) -> Plan:
    expr.validate(problem.facts)
    return Unbound(expr)


@plan.register
def _(expr: ArrayLeaf, problem: Problem) -> Plan:
    if expr.size != problem.size:
        raise VectorError(f"{expr} is {expr.size} x {expr.size}, but the problem has {problem.size} parameters")
    return LeafPlan(expr)


@plan.register
def _(expr: Jacobian, problem: Problem) -> Plan:
    expr.validate(problem.facts)
    return OutputPlan(problem, "jacobian")


@plan.register
def _(expr: LossHessian, problem: Problem) -> Plan:
    expr.validate(problem.facts)
    return OutputPlan(problem, "loss_hessian")


@plan.register
def _(expr: alg.Transpose, problem: Problem) -> Plan:
    inner = expr.expr
    if isinstance(inner, Jacobian):
        return OutputPlan(problem, "jacobian.T")
    if isinstance(inner, ArrayLeaf):
        plan(inner, problem)
        return LeafPlan(inner, transpose=True)
    if isinstance(inner, Term):
        inner.validate(problem.facts)
        return SweepPlan(problem, Sweep(((1.0, transposed(inner)),)), expr)
    if isinstance(inner, MatrixTerm):
        inner.validate(problem.facts)
        return Unbound(expr)
    raise ExpressionError(f"the transpose of {type(inner).__name__} cannot be lowered ({expr})")


@plan.register
def _(expr: alg.Product, problem: Problem) -> Plan:
    return ProductPlan(tuple(plan(factor, problem) for factor in expr.factors))


@plan.register
def _(expr: alg.Sum, problem: Problem) -> Plan:
    sweeps: dict[Problem, list[tuple[float, Term]]] = {}
    fused: dict[Problem, list[tuple[Expr, Fraction]]] = {}
    parts: list[tuple[float, Plan]] = []
    for child, coefficient in _by_last_factor(expr.coefficients).items():
        part = plan(child, problem)
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
    return SumPlan(tuple(parts), as_float(expr.shift))


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
def _(expr: alg.Restriction, problem: Problem) -> Plan:
    restricted = problem.restricted(expr.params)
    return plan(expr.expr, restricted)


@plan.register
def _(expr: alg.BlockDiagonal, problem: Problem) -> Plan:
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
        plans.append((positions, plan(block.expr, restricted), label))
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
