"""From expressions to plans: one rule per kind of node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import singledispatch

import curvalg.expr as alg
from curvalg.errors import ExpressionError, FactsError, VectorError
from curvalg.expr.leaves import ArrayLeaf
from curvalg.expr.node import Expr
from curvalg.expr.term import MatrixTerm, NamedExpr, Term
from curvalg.expr.terms import Jacobian, LossHessian
from curvalg.lowering.bind import Planner, unbound
from curvalg.lowering.factored import MOST_COLUMNS, FactoredPlan
from curvalg.lowering.form import Matrix, affine, multiple
from curvalg.lowering.forms import find
from curvalg.lowering.parts import Computed
from curvalg.lowering.places import Places
from curvalg.lowering.plan import (
    BlocksPlan,
    InversePlan,
    LeafPlan,
    OutputPlan,
    Plan,
    ProductPlan,
    RootPlan,
    SubmatrixPlan,
    SumPlan,
    SweepPlan,
    Unbound,
    ZeroPlan,
    as_float,
)
from curvalg.lowering.preconditioners import Given, given_preconditioner
from curvalg.lowering.strategies import Preconditioning, Request, choose
from curvalg.lowering.submatrices import block_places, block_problem, is_inside, places
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
    if expr.domain is None:
        return SumPlan((), multiple(expr))
    if unbound(expr):
        return Unbound(expr)
    matrix = Matrix(expr.expr, problem, _planner(given))
    solver, chain = choose(Request(expr, matrix, _preconditioning(expr, problem, given)))
    return InversePlan(expr, solver, tuple(chain), plan(expr.expr, problem, given))


def _planner(given: Given) -> Planner:
    return lambda expr, problem: plan(expr, problem, given)


def _preconditioning(expr: alg.Inverse, problem: Problem, given: Given) -> Preconditioning | None:
    """R -> P⁻¹ R from the expression's own preconditioner, else from the one given when lowering.

    Raises:
        ExpressionError: the preconditioner's own inverse is iterative, so that it is no fixed linear map.
    """
    if expr.preconditioner is None:
        return None if given is None else given_preconditioner(given)
    inverse = plan(simplify(alg.inverse(expr.preconditioner), problem.facts).expr, problem)
    todo: list[Plan] = [inverse]
    while todo:
        node = todo.pop()
        if isinstance(node, InversePlan):
            if node.solver.iterative:
                raise ExpressionError(
                    f"the preconditioner {expr.preconditioner} would itself be inverted by {node.solver.name}, which is no "
                    "fixed linear map; choose one with a structured inverse, such as nystrom(A, rank) + c * Identity, "
                    "diagonal_part(A) or block_diagonal(A), damped"
                )
            node.checked = False
        todo.extend(node.inner)
    return inverse.apply


@plan.register
def _(expr: alg.SquareRoot, problem: Problem, given: Given = None) -> Plan:
    if expr.domain is None:
        return SumPlan((), multiple(expr))
    if unbound(expr):
        return Unbound(expr)
    form, chain = find(Matrix(expr.expr, problem, _planner(given), spectral=True))
    if form is None:
        raise FactsError(
            f"sqrt({expr.expr}) has no exact form: {'; '.join(chain)}. Square roots need a structured matrix: a diagonal, Kronecker "
            "factors, blocks, few output directions, or at most 4096 symmetric rows"
        )
    return RootPlan(expr, form, tuple(chain))


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
    return _swept(problem, Sweep(((1.0, expr),)), expr)


@plan.register
def _(expr: MatrixTerm, problem: Problem, given: Given = None) -> Plan:
    _validate(expr, problem)
    return Unbound(expr)


@plan.register(alg.DiagonalPart)
@plan.register(alg.DiagonalEstimate)
@plan.register(alg.Nystrom)
def _(expr: Computed, problem: Problem, given: Given = None) -> Plan:
    if not unbound(expr.expr):
        plan(expr.expr, problem, given)  # what cannot be lowered is refused now, not at the first product
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
        if isinstance(part, FactoredPlan) and isinstance(part.otherwise, SweepPlan):
            part = part.otherwise  # alone it has ways of its own, but fused it costs next to nothing
        if isinstance(part, SweepPlan):  # a restricted term runs on a problem of its own
            entries = [(as_float(coefficient) * c, term) for c, term in part.sweep.entries]
            sweeps.setdefault(part.problem, []).extend(entries)
            fused.setdefault(part.problem, []).append((child, coefficient))
        else:
            parts.append((as_float(coefficient), part))
    parts = [*(_sweep(on, entries, fused[on]) for on, entries in sweeps.items()), *parts]
    if len(parts) == 1 and parts[0][0] == 1 and not expr.shift:
        return parts[0][1]
    return SumPlan(tuple(parts), as_float(expr.shift))


def _sweep(
    problem: Problem, entries: Sequence[tuple[float, Term]], summands: Sequence[tuple[Expr, Fraction]]
) -> tuple[float, Plan]:
    if len(entries) == 1:  # a number in front of the pass, so that another one shares the recordings
        return entries[0][0], _swept(problem, Sweep(((1.0, entries[0][1]),)), summands[0][0])
    return 1.0, _swept(problem, Sweep(tuple(entries)), alg.add(summands))


PATIENCE = 16
"""Columns after which a whole matrix is tried in factored form: recording and comparing it takes about as long."""


def _swept(problem: Problem, sweep: Sweep, expr: Expr) -> Plan:
    """A sweep, with the other ways that terms of few output directions have."""
    ordinary = SweepPlan(problem, sweep, expr)
    if not _has_factor(sweep.entries, problem) or not _may_be_factored(problem):
        return ordinary
    return FactoredPlan(problem, _in_order(sweep.entries), (tuple(problem.layout.names),), (0.0,), ordinary, PATIENCE)


def _may_be_factored(problem: Problem) -> bool:
    return (
        bool(problem.factored)
        and problem.budget.limit > 0
        and problem.data.ordered
        and not problem.model.batch_statistics
    )


def _has_factor(entries: Sequence[tuple[float, Expr]], problem: Problem) -> bool:
    """Whether all terms have columns V with V Vᵀ = A."""
    return all(
        isinstance(part, Term) and type(part).factor is not Term.factor and part.facts(problem.facts).psd is True
        for _, part in entries
    )


def _in_order(entries: Sequence[tuple[float, Expr]]) -> list[tuple[float, Term]]:
    """One order of the terms, so that sums written in any order share what is kept."""
    return sorted([(c, part) for c, part in entries if isinstance(part, Term)], key=lambda entry: repr(entry[1]))


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
    if is_inside(inner, restricted, problem):
        return plan(inner, restricted, given)
    # A sub-matrix of an inverse or a product is not the inverse or product of sub-matrices.
    return SubmatrixPlan(
        plan(inner, problem, given),
        problem.size,
        places(problem, params_.match(expr.params, problem.layout.names)),
        domain=inner.domain == "parameters",
        codomain=inner.codomain == "parameters",
        label=", ".join(expr.params),
    )


@plan.register
def _(expr: alg.BlockDiagonal, problem: Problem, given: Given = None) -> Plan:
    blocks = expr.what
    if not expr.complete or isinstance(blocks, alg.Expr):
        raise AssertionError("block-diagonals are resolved before they are planned")
    factored = _factorable(blocks, problem)
    plans = [
        (
            block_places(problem, block),
            plan(block.expr, block_problem(problem, block), given),
            ", ".join(block.params),
        )
        for block in blocks
    ]
    if len(factored) < 2:
        return BlocksPlan(tuple(plans))
    return _with_factored(blocks, factored, plans, problem)


def _factorable(blocks: Sequence[alg.Block], problem: Problem) -> list[int]:
    """Which blocks are of one sum of terms with few output directions, so that their products can be taken together."""
    if not _may_be_factored(problem):
        return []
    sums: dict[frozenset[tuple[float, Expr]], list[int]] = {}
    for number, block in enumerate(blocks):
        parts, _ = affine(block.expr)
        if parts and _has_factor(parts, problem) and not block.joint:
            sums.setdefault(frozenset(parts), []).append(number)
    if not sums:
        return []
    entries, numbers = max(sums.items(), key=lambda item: len(item[1]))
    few = len(numbers) > 1 and sum(problem.factor_columns(t) for _, t in entries if isinstance(t, Term)) <= MOST_COLUMNS
    return numbers if few else []


def _with_factored(
    blocks: Sequence[alg.Block], factored: list[int], plans: Sequence[tuple[Places, Plan, str]], problem: Problem
) -> Plan:
    names = problem.layout.names
    groups = tuple(blocks[i].params for i in factored)
    chosen = [name for name in names if any(name in group for group in groups)]
    on = problem if len(chosen) == len(names) else problem.restricted(chosen)
    parts = [affine(blocks[i].expr) for i in factored]
    entries = _in_order(parts[0][0])
    alone = tuple((block_places(on, blocks[i]), plans[i][1], plans[i][2]) for i in factored)
    joint = FactoredPlan(on, entries, groups, [shift for _, shift in parts], BlocksPlan(alone), patience=0)
    if len(factored) == len(blocks):
        return joint
    rest = [plans[i] for i in range(len(blocks)) if i not in factored]
    return BlocksPlan(((places(problem, chosen), joint, f"{len(groups)} groups"), *rest))
