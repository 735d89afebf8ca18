"""From expressions to plans: one rule per kind of node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import singledispatch

import torch
from torch import Tensor

import curvalg.expr as alg
from curvalg.errors import ExpressionError, VectorError
from curvalg.expr.leaves import ArrayLeaf
from curvalg.expr.node import Expr
from curvalg.expr.term import MatrixTerm, NamedExpr, Term
from curvalg.expr.terms import Jacobian, LossHessian
from curvalg.lowering.plan import (
    BlocksPlan,
    InversePlan,
    LeafPlan,
    OutputPlan,
    Plan,
    ProductPlan,
    SubmatrixPlan,
    SumPlan,
    SweepPlan,
    Unbound,
    ZeroPlan,
    as_float,
    output_sizes,
)
from curvalg.lowering.preconditioners import Given, given_preconditioner
from curvalg.lowering.strategies import Preconditioning, Request, choose
from curvalg.lowering.sweep import Sweep
from curvalg.lowering.transposed import transposed
from curvalg.problem import Problem
from curvalg.problem import parameters as params_
from curvalg.rewrite import simplify


@singledispatch
def plan(expr: Expr, problem: Problem, given: Given = None) -> Plan:
    """The plan of a simplified expression on a problem.

    Args:
        expr: an expression.
        problem: the problem, restricted already where the expression is inside a restriction.
        given: a preconditioner for inverses that name none: an operator or a function, v -> P⁻¹ v.

    Raises:
        ExpressionError: a node that cannot be lowered.
    """
    raise ExpressionError(f"{expr} cannot be lowered: there is no rule for {type(expr).__name__}")


@plan.register
def _(expr: alg.Inverse, problem: Problem, given: Given = None) -> Plan:
    if matrix_terms(expr):
        return Unbound(expr)
    rows = problem if expr.domain_params is None else problem.restricted(expr.domain_params)
    size = rows.size if expr.domain != "outputs" else sum(output_sizes(problem, problem.snapshot()))
    matrix = plan(expr.expr, problem, given)
    facts = expr.expr.facts(problem.facts)
    request = Request(expr, facts, problem, size, matrix, _preconditioning(expr, problem, given))
    solver, chain = choose(request)
    return InversePlan(expr, solver, tuple(chain), matrix)


def _preconditioning(expr: alg.Inverse, problem: Problem, given: Given) -> Preconditioning | None:
    """R -> P⁻¹ R from the expression's own preconditioner, else from the one given when lowering."""
    if expr.preconditioner is not None:
        inverse = plan(simplify(alg.inverse(expr.preconditioner), problem.facts).expr, problem)
        return inverse.apply
    return None if given is None else given_preconditioner(given)


def matrix_terms(expr: Expr) -> list[MatrixTerm]:
    """All matrix terms of an expression, those of preconditioners included, each once."""
    if isinstance(expr, MatrixTerm):
        return [expr]
    parts = list(expr.children)
    if isinstance(expr, alg.Inverse) and expr.preconditioner is not None:
        parts.append(expr.preconditioner)
    return list(dict.fromkeys(term for part in parts for term in matrix_terms(part)))


@plan.register
def _(expr: alg.IdentityExpr, problem: Problem, given: Given = None) -> Plan:
    return SumPlan((), 1.0)


@plan.register
def _(expr: alg.ZeroExpr, problem: Problem, given: Given = None) -> Plan:
    rows = problem if expr.codomain_params is None else problem.restricted(expr.codomain_params)
    return ZeroPlan(rows, expr.codomain)


def _validate(term: NamedExpr, problem: Problem) -> None:
    term.validate(problem.facts)
    if term.numbered:
        problem.number_samples()


@plan.register
def _(expr: Term, problem: Problem, given: Given = None) -> Plan:
    _validate(expr, problem)
    return SweepPlan(problem, Sweep(((1.0, expr),)), expr)


@plan.register
def _(expr: MatrixTerm, problem: Problem, given: Given = None) -> Plan:
    _validate(expr, problem)
    return Unbound(expr)


@plan.register
def _(expr: ArrayLeaf, problem: Problem, given: Given = None) -> Plan:
    if expr.size != problem.size:
        raise VectorError(f"{expr} is {expr.size} x {expr.size}, but the problem has {problem.size} parameters")
    return LeafPlan(expr)


@plan.register
def _(expr: Jacobian, problem: Problem, given: Given = None) -> Plan:
    _validate(expr, problem)
    return OutputPlan(problem, "jacobian")


@plan.register
def _(expr: LossHessian, problem: Problem, given: Given = None) -> Plan:
    _validate(expr, problem)
    return OutputPlan(problem, "loss_hessian")


@plan.register
def _(expr: alg.Transpose, problem: Problem, given: Given = None) -> Plan:
    inner = expr.expr
    if isinstance(inner, Jacobian):
        return OutputPlan(problem, "jacobian.T")
    if isinstance(inner, ArrayLeaf):
        plan(inner, problem, given)
        return LeafPlan(inner, transpose=True)
    if isinstance(inner, Term):
        _validate(inner, problem)
        return SweepPlan(problem, Sweep(((1.0, transposed(inner)),)), expr)
    if isinstance(inner, MatrixTerm):
        _validate(inner, problem)
        return Unbound(expr)
    raise ExpressionError(f"the transpose of {type(inner).__name__} cannot be lowered ({expr})")


@plan.register
def _(expr: alg.Product, problem: Problem, given: Given = None) -> Plan:
    return ProductPlan(tuple(plan(factor, problem, given) for factor in expr.factors))


@plan.register
def _(expr: alg.Sum, problem: Problem, given: Given = None) -> Plan:
    sweeps: dict[Problem, list[tuple[float, Term]]] = {}
    fused: dict[Problem, list[tuple[Expr, Fraction]]] = {}
    parts: list[tuple[float, Plan]] = []
    for child, coefficient in _by_last_factor(expr.coefficients).items():
        part = plan(child, problem, given)
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
def _(expr: alg.Restriction, problem: Problem, given: Given = None) -> Plan:
    restricted = problem.restricted(expr.params)
    inner = expr.expr
    if is_local(inner) or _sized_for(inner, restricted, problem):
        return plan(inner, restricted, given)
    # A sub-matrix of an inverse or a product is not the inverse or product of sub-matrices.
    return SubmatrixPlan(
        plan(inner, problem, given),
        problem.size,
        flat_positions(problem, expr.params),
        domain=inner.domain == "parameters",
        codomain=inner.codomain == "parameters",
        label=", ".join(expr.params),
    )


def is_local(expr: Expr) -> bool:
    """Whether an expression's sub-matrix is what it gives when only the chosen parameters are differentiated."""
    if isinstance(expr, (alg.Sum, alg.Transpose)):
        return all(map(is_local, expr.children))
    return isinstance(expr, (Term, MatrixTerm, Jacobian, LossHessian, alg.IdentityExpr, alg.ZeroExpr))


def _sized_for(expr: Expr, restricted: Problem, problem: Problem) -> bool:
    """Whether an expression of array leaves was made over the restricted parameters already (a bound matrix term)."""
    sizes = {leaf.size for leaf in _array_leaves(expr)}
    return sizes == {restricted.size} != {problem.size}


def _array_leaves(expr: Expr) -> list[ArrayLeaf]:
    if isinstance(expr, ArrayLeaf):
        return [expr]
    if isinstance(expr, (alg.Restriction, alg.BlockDiagonal)):
        return []
    return [leaf for child in expr.children for leaf in _array_leaves(child)]


def flat_positions(problem: Problem, patterns: Sequence[str]) -> Tensor:
    """Flat positions of the parameters that match, in the problem's order."""
    flat = torch.arange(problem.size, device=problem.device)
    return torch.cat([flat[problem.layout.slices[name]] for name in params_.match(patterns, problem.layout.names)])


@plan.register
def _(expr: alg.BlockDiagonal, problem: Problem, given: Given = None) -> Plan:
    whole = expr.what if isinstance(expr.what, Expr) else None
    blocks = [alg.Block(g, whole) for g in partition(expr.by, problem)] if whole is not None else list(expr.what)  # type: ignore[arg-type]
    seen: dict[str, str] = {}
    plans = []
    for block in blocks:
        if block.joint:
            raise ExpressionError(
                "blocks in the joint [W | b] layout cannot be lowered; lay the parameters one after another"
            )
        label = ", ".join(block.params)
        for name in params_.match(block.params, problem.layout.names):
            if name in seen:
                raise ExpressionError(
                    f"blocks must not overlap, but {name!r} is in those of {seen[name]!r} and {label!r}"
                )
            seen[name] = label
        if whole is not None:
            part = plan(simplify(alg.restrict(whole, block.params), problem.facts).expr, problem, given)
        else:
            part = plan(block.expr, problem.restricted(block.params), given)
        plans.append((flat_positions(problem, block.params), part, label))
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
