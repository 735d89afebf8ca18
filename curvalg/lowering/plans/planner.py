"""The planner: from expressions to plans, one rule per kind of node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import singledispatch

from torch import Tensor

import curvalg.expr as alg
from curvalg.errors import ExpressionError, FactsError, VectorError
from curvalg.expr.affine_form import multiple
from curvalg.expr.node import Expr
from curvalg.expr.nodes.arrays import ArrayLeaf
from curvalg.expr.scalars import as_float
from curvalg.expr.term import DatasetTerm, GradientTerm, MatrixTerm, NamedExpr, Term
from curvalg.expr.terms import Jacobian, LossHessian
from curvalg.lowering.blocks.owned_matrix import is_layerwise
from curvalg.lowering.blocks.rows import RowRanges
from curvalg.lowering.blocks.submatrices import block_places, block_problem, is_inside, places
from curvalg.lowering.inverses.forms import find
from curvalg.lowering.inverses.offer import BoundMatrix, Found
from curvalg.lowering.inverses.preconditioners import Given, given_preconditioner
from curvalg.lowering.inverses.solver import InverseRequest, Preconditioning
from curvalg.lowering.inverses.solvers import choose
from curvalg.lowering.low_rank.factored_sum import FactoredSum, factored_sum, in_order, why_not_factored
from curvalg.lowering.plans.algebra_plan import (
    BlocksPlan,
    LeafPlan,
    ProductPlan,
    SharedPlan,
    SubmatrixPlan,
    SumPlan,
    UnboundPlan,
    ZeroPlan,
    blocks_of,
    entry_plan,
    own_part,
    shared,
)
from curvalg.lowering.plans.bind import unbound
from curvalg.lowering.plans.computed import Computed
from curvalg.lowering.plans.inverse_plan import InversePlan, RootPlan
from curvalg.lowering.plans.low_rank_plan import MOST_COLUMNS, LowRankPlan
from curvalg.lowering.plans.of_data.gradient_plan import GradientPlan
from curvalg.lowering.plans.of_data.output_plan import OutputPlan
from curvalg.lowering.plans.of_data.sweep_plan import SweepPlan
from curvalg.lowering.plans.owned_plan import owned_plan
from curvalg.lowering.plans.plan import Plan
from curvalg.lowering.plans.sharded_offer import require_offered
from curvalg.lowering.sweeps.contract import require_defined
from curvalg.lowering.sweeps.sweep import Sweep
from curvalg.lowering.sweeps.transposed import transposed
from curvalg.problem import Problem, Snapshot
from curvalg.problem.model import parameters as params_
from curvalg.rewrite import simplify


def plan(expr: Expr, problem: Problem, given: Given = None) -> Plan:
    """The plan of a simplified expression on a problem.

    Args:
        expr: an expression.
        problem: the problem, restricted already where the expression is inside a restriction.
        given: a preconditioner for inverses that name none: an operator or a function, v -> P⁻¹ v.

    Raises:
        ExpressionError: a node that cannot be lowered.
    """
    return Planning(given)(expr, problem)


class Planning:
    """The planning of one expression, in which equal parts are planned once.

    Args:
        given: a preconditioner for inverses that name none.
    """

    def __init__(self, given: Given) -> None:
        self.given = given
        self._plans: dict[tuple[Expr, Problem], Plan] = {}
        self._forms: Found = {}

    def __call__(self, expr: Expr, problem: Problem) -> Plan:
        if problem.group.sharded:
            require_offered(expr, problem)
        for node in [*self._inverses_in(expr, problem), expr]:
            if (node, problem) not in self._plans:
                owned = problem.group.sharded and is_layerwise(node) and not unbound(node)
                self._plans[node, problem] = owned_plan(node, problem, plan) if owned else _rule(node, problem, self)
        return self._plans[expr, problem]

    def _inverses_in(self, expr: Expr, problem: Problem) -> list[Expr]:
        """Inverses that the plan will meet and that have none yet, innermost first: planned so, they take no stack."""
        found: dict[Expr, None] = {}
        todo = [] if problem.group.sharded and is_layerwise(expr) else _visible(expr)
        while todo:
            node = todo.pop()
            if isinstance(node, _TRANSPARENT) and node not in found and (node, problem) not in self._plans:
                found[node] = None
                todo += [] if problem.group.sharded and is_layerwise(node) else _visible(node)
        return [node for node in reversed(found) if isinstance(node, alg.Inverse)]

    def matrix(self, expr: Expr, problem: Problem, *, spectral: bool = False) -> BoundMatrix:
        """A matrix to be put into a structured form."""
        return BoundMatrix(expr, problem, self, spectral, self._forms)


_TRANSPARENT = (alg.Sum, alg.Product, alg.Inverse)


def _visible(expr: Expr) -> list[Expr]:
    """The expressions that a plan meets on the same problem; preconditioners are planned by themselves."""
    if isinstance(expr, alg.Inverse):
        return [expr.expr]
    return list(expr.children) if isinstance(expr, _TRANSPARENT) else []


@singledispatch
def _rule(expr: Expr, problem: Problem, plan: Planning) -> Plan:
    raise ExpressionError(f"{expr} cannot be lowered: there is no rule for {type(expr).__name__}")


@_rule.register
def _(expr: alg.Inverse, problem: Problem, plan: Planning) -> Plan:
    if expr.domain is None:
        return SumPlan((), multiple(expr))
    if unbound(expr):
        return UnboundPlan(expr)
    request = InverseRequest(expr, plan.matrix(expr.expr, problem), _preconditioning(expr, problem, plan.given))
    solver, chain = choose(request)
    return InversePlan(expr, solver, tuple(chain), plan(expr.expr, problem))


def _preconditioning(expr: alg.Inverse, problem: Problem, given: Given) -> Preconditioning | None:
    """A function R -> P⁻¹ R from the expression's own preconditioner, else from the one given when lowering.

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

    def apply(snapshot: Snapshot, r: Tensor) -> Tensor:
        try:
            return inverse.apply(snapshot, r)
        except FactsError as error:
            raise FactsError(f"the preconditioner {expr.preconditioner} has no inverse: {error}") from error

    return apply


@_rule.register
def _(expr: alg.SquareRoot, problem: Problem, plan: Planning) -> Plan:
    if expr.domain is None:
        return SumPlan((), multiple(expr))
    if unbound(expr):
        return UnboundPlan(expr)
    form, chain = find(plan.matrix(expr.expr, problem, spectral=True))
    if form is None:
        raise FactsError(
            f"sqrt({expr.expr}) has no exact form: {'; '.join(chain)}. Square roots need a structured matrix: a diagonal, "
            "Kronecker factors, blocks, few output directions, or at most 4096 symmetric rows"
        )
    return RootPlan(expr, form, tuple(chain))


@_rule.register
def _(expr: alg.IdentityExpr, problem: Problem, plan: Planning) -> Plan:
    return SumPlan((), 1.0)


@_rule.register
def _(expr: alg.ZeroExpr, problem: Problem, plan: Planning) -> Plan:
    return ZeroPlan(problem, expr.codomain, expr.codomain_params)


def _validate(term: NamedExpr, problem: Problem) -> None:
    require_defined(term)
    term.validate(problem.facts)
    if term.numbered:
        problem.number_samples()


@_rule.register
def _(expr: Term, problem: Problem, plan: Planning) -> Plan:
    _validate(expr, problem)
    return _swept(problem, Sweep(((1.0, expr),)), expr)


@_rule.register
def _(expr: MatrixTerm, problem: Problem, plan: Planning) -> Plan:
    _validate(expr, problem)
    return UnboundPlan(expr)


@_rule.register
def _(expr: GradientTerm, problem: Problem, plan: Planning) -> Plan:
    _validate(expr, problem)
    return GradientPlan(problem, expr)


@_rule.register(alg.DiagonalPart)
@_rule.register(alg.DiagonalEstimate)
@_rule.register(alg.Nystrom)
def _(expr: Computed, problem: Problem, plan: Planning) -> Plan:
    if not unbound(expr.expr):
        plan(expr.expr, problem)  # what cannot be lowered is refused now, not at the first product
    return UnboundPlan(expr)


@_rule.register
def _(expr: ArrayLeaf, problem: Problem, plan: Planning) -> Plan:
    if expr.size != problem.size:
        raise VectorError(f"{expr} is {expr.size} x {expr.size}, but the problem has {problem.size} parameters")
    return LeafPlan(expr)


@_rule.register
def _(expr: Jacobian, problem: Problem, plan: Planning) -> Plan:
    _validate(expr, problem)
    return OutputPlan(problem, "jacobian")


@_rule.register
def _(expr: LossHessian, problem: Problem, plan: Planning) -> Plan:
    _validate(expr, problem)
    return OutputPlan(problem, "loss_hessian")


@_rule.register
def _(expr: alg.Transpose, problem: Problem, plan: Planning) -> Plan:
    inner = expr.expr
    if isinstance(inner, Jacobian):
        return OutputPlan(problem, "jacobian.T")
    if isinstance(inner, ArrayLeaf):
        plan(inner, problem)
        return LeafPlan(inner, transpose=True)
    if isinstance(inner, Term):
        _validate(inner, problem)
        return shared(SweepPlan(problem, Sweep(((1.0, transposed(inner)),)), expr), problem)
    if isinstance(inner, MatrixTerm):
        _validate(inner, problem)
        return UnboundPlan(expr)
    raise ExpressionError(f"the transpose of {type(inner).__name__} cannot be lowered ({expr})")


@_rule.register
def _(expr: alg.Product, problem: Problem, plan: Planning) -> Plan:
    return ProductPlan(tuple(plan(factor, problem) for factor in expr.factors))


@_rule.register
def _(expr: alg.Sum, problem: Problem, plan: Planning) -> Plan:
    sweeps: dict[Problem, list[tuple[float, Term]]] = {}
    fused: dict[Problem, list[tuple[Expr, Fraction]]] = {}
    parts: list[tuple[float, Plan]] = []
    for child, coefficient in _by_last_factor(expr.coefficients).items():
        planned = plan(child, problem)
        part = planned.own if isinstance(planned, SharedPlan) else planned
        if isinstance(part, LowRankPlan) and isinstance(part.otherwise, SweepPlan):
            part = part.otherwise  # alone it has ways of its own, but fused it costs next to nothing
        if isinstance(part, SweepPlan):  # a restricted term runs on a problem of its own
            entries = [(as_float(coefficient) * c, term) for c, term in part.sweep.entries]
            sweeps.setdefault(part.problem, []).extend(entries)
            fused.setdefault(part.problem, []).append((child, coefficient))
        else:
            parts.append((as_float(coefficient), planned))
    parts = [*(_sweep(on, entries, fused[on]) for on, entries in sweeps.items()), *parts]
    return _sum_of(parts, as_float(expr.shift), problem)


def _sum_of(parts: Sequence[tuple[float, Plan]], shift: float, problem: Problem) -> Plan:
    """The sum of plans and a multiple of the identity; what is a sum over data takes one exchange together."""
    of_data = [(c, own_part(part)) for c, part in parts if isinstance(part, SharedPlan)]
    if len(of_data) > 1:
        together = shared(SumPlan(tuple(of_data), 0.0), problem)
        parts = [(1.0, together), *((c, part) for c, part in parts if not isinstance(part, SharedPlan))]
    if len(parts) == 1 and parts[0][0] == 1 and not shift:
        return parts[0][1]
    return SumPlan(tuple(parts), shift)


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
    if not _worth_factoring(problem, sweep.entries) or why_not_factored(sweep.entries, problem) is not None:
        return ordinary if problem.group.alone else shared(ordinary, problem)
    names = tuple(problem.layout.names)
    factored = LowRankPlan(problem, in_order(sweep.entries), (names,), (0.0,), ordinary, PATIENCE)
    return factored if problem.group.alone else shared(factored, problem)


def _worth_factoring(problem: Problem, entries: Sequence[tuple[float, Term]]) -> bool:
    """Whether products by layer inputs and deltas, or by V, are asked for and can be kept."""
    if not (problem.factored and problem.budget.limit > 0 and problem.data.ordered):
        return False
    if problem.group.alone:
        return True
    if any(isinstance(term, DatasetTerm) for _, term in entries):  # whose totals are of the data of all processes
        return False
    for _, term in entries:
        if type(term).factor is not Term.factor:
            problem.factor_columns(term)  # found together now, since each process tries its ways when it likes
    return True


def _by_last_factor(coefficients: Mapping[Expr, Fraction]) -> dict[Expr, Fraction]:
    """The sum A @ C + B @ C as (A + B) @ C: products with one last factor share its result, and so one input."""
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


@_rule.register
def _(expr: alg.Restriction, problem: Problem, plan: Planning) -> Plan:
    restricted = problem.restricted(expr.params)
    inner = expr.expr
    if is_inside(inner, restricted, problem):
        return plan(inner, restricted)
    # A sub-matrix of an inverse or a product is not the inverse or product of sub-matrices.
    return SubmatrixPlan(
        plan(inner, problem),
        problem.size,
        places(problem, params_.match(expr.params, problem.layout.names)),
        domain=inner.domain == "parameters",
        codomain=inner.codomain == "parameters",
        label=", ".join(expr.params),
    )


@_rule.register
def _(expr: alg.EntryRestriction, problem: Problem, plan: Planning) -> Plan:
    return entry_plan(expr, problem, plan)


@_rule.register
def _(expr: alg.BlockDiagonal, problem: Problem, plan: Planning) -> Plan:
    blocks = expr.what
    if not expr.complete or isinstance(blocks, alg.Expr):
        raise AssertionError("block-diagonals are resolved before they are planned")
    factored = _factorable(blocks, problem)
    plans = [
        (
            block_places(problem, block),
            plan(block.expr, block_problem(problem, block)),
            ", ".join(block.params),
        )
        for block in blocks
    ]
    _share([part for _, part, _ in plans], blocks, problem)
    if len(factored) < 2:
        return blocks_of(BlocksPlan(tuple(plans)), problem)
    return _with_factored(blocks, factored, plans, problem)


def _share(plans: Sequence[Plan], blocks: Sequence[alg.Block], problem: Problem) -> None:
    """Note what several blocks have in common, so that it is recorded once for all of them."""
    found: Counter[object] = Counter()
    for part, block in zip(plans, blocks, strict=True):
        todo, mine = [part], set[object]()
        while todo:
            node = todo.pop()
            if isinstance(node, SweepPlan) and node.problem.whole is problem:
                mine.add(("sweep", node.sweep.key))
            todo.extend(node.inner)
        if isinstance(total := factored_sum(block.expr, problem), FactoredSum):
            mine.add(("factor", total.terms))
        found.update(mine)
    problem.shared |= {what for what, count in found.items() if count > 1}


def _factorable(blocks: Sequence[alg.Block], problem: Problem) -> dict[int, FactoredSum]:
    """The blocks that are of one sum of terms with few output directions, so that their products can be taken together."""
    sums: dict[tuple[tuple[float, Term], ...], dict[int, FactoredSum]] = {}
    for number, block in enumerate(blocks):
        total = factored_sum(block.expr, problem)
        if not isinstance(total, FactoredSum) or block.joint or not _worth_factoring(problem, total.entries):
            continue
        if problem.group.alone or not total.shift:  # a shift is added once, not by each process
            sums.setdefault(total.entries, {})[number] = total
    if not sums:
        return {}
    entries, found = max(sums.items(), key=lambda item: len(item[1]))
    few = len(found) > 1 and sum(problem.factor_columns(term) for _, term in entries) <= MOST_COLUMNS
    return found if few else {}


def _with_factored(
    blocks: Sequence[alg.Block],
    factored: Mapping[int, FactoredSum],
    plans: Sequence[tuple[RowRanges, Plan, str]],
    problem: Problem,
) -> Plan:
    names = problem.layout.names
    groups = tuple(blocks[i].params for i in factored)
    chosen = [name for name in names if any(name in group for group in groups)]
    on = problem if len(chosen) == len(names) else problem.restricted(chosen)
    totals = list(factored.values())
    each = tuple((block_places(on, blocks[i]), own_part(plans[i][1]), plans[i][2]) for i in factored)
    shifts = [total.shift for total in totals]
    # Recording takes a third of a gradient a direction, a product of all blocks at least one gradient a block.
    directions = sum(problem.factor_columns(term) for _, term in totals[0].entries)
    patience = directions // (4 * len(groups))
    joint = shared(LowRankPlan(on, totals[0].entries, groups, shifts, BlocksPlan(each), patience), problem)
    if len(factored) == len(blocks):
        return joint
    rest = [plans[i] for i in range(len(blocks)) if i not in factored]
    return blocks_of(BlocksPlan(((places(problem, chosen), joint, f"{len(groups)} groups"), *rest)), problem)
