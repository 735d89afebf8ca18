"""Binding: the matrices that need passes over the data become structured leaves, made once and kept on the problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from curvalg.distributed.group import Group, activated
from curvalg.errors import CurvalgError, ExpressionError
from curvalg.expr import (
    Block,
    BlockDiagonal,
    EntryRestriction,
    Restriction,
    restrict,
)
from curvalg.expr.entries import entries_of
from curvalg.expr.node import Expr
from curvalg.expr.nodes.composite import settled
from curvalg.expr.term import MatrixTerm
from curvalg.lowering.blocks.complete_blocks import resolve
from curvalg.lowering.blocks.owned_matrix import OwnedMatrix, ownership
from curvalg.lowering.blocks.owner_sums import settled_by_owners, summed_by_owners
from curvalg.lowering.blocks.submatrices import block_problem, is_local, submatrix
from curvalg.lowering.inverses.offer import BoundMatrix
from curvalg.lowering.plans.computed import Computed, compute
from curvalg.lowering.replayed import Repeatable
from curvalg.lowering.sweeps.contract import call
from curvalg.problem import Evaluation, Layout, Problem, Snapshot
from curvalg.problem.layers.notes import LayerNotes
from curvalg.problem.layers.recorded import record_layers
from curvalg.rewrite import simplify

Planner = Callable[[Expr, Problem], Repeatable]


def unbound(expr: Expr) -> list[Expr]:
    """Every matrix in an expression that needs a pass over the data to be made, each once.

    Matrices of preconditioners are included.
    """
    if not expr.children:
        return [expr] if isinstance(expr, MatrixTerm) else []
    return settled(expr, "unbound", _unbound)


def _unbound(expr: Expr) -> list[Expr]:
    if isinstance(expr, get_args(Computed)):
        return [expr]
    return list(dict.fromkeys(term for part in expr.children for term in unbound(part)))


def bind(expr: Expr, problem: Problem, snapshot: Snapshot, planner: Planner, whole: Problem | None = None) -> Expr:
    """The expression with everything unbound replaced by what it finishes as.

    Matrices are kept on the problem, so that an expression that differs only in other parts reuses them.

    Args:
        expr: resolved and simplified.
        problem: restricted already where the expression is inside a restriction or a block.
        snapshot: the state.
        planner: gives products.
        whole: the problem over all parameters; None: ``problem``.
    """
    whole = whole or problem
    if not unbound(expr):
        return expr
    if isinstance(expr, MatrixTerm):
        _accumulate([expr], problem, snapshot)
        return resolve(problem.cached(snapshot).found("matrix", expr), problem)
    if isinstance(expr, Computed):
        return _computed(expr, problem, snapshot, planner, whole)
    if isinstance(expr, Restriction):
        # The methods of a term see the restricted problem only; the finished matrix is square in it already.
        on = problem.restricted(expr.params) if is_local(expr.expr) else problem
        return submatrix(bind(expr.expr, on, snapshot, planner, whole), expr.params, on)
    if isinstance(expr, BlockDiagonal) and isinstance(expr.what, tuple):
        blocks = [
            Block(b.params, bind(b.expr, block_problem(problem, b), snapshot, planner, whole), joint=b.joint)
            for b in expr.what
        ]
        return BlockDiagonal(tuple(blocks), None, expr.complete)
    _accumulate(_matrix_terms_here(expr), problem, snapshot)
    return expr.rebuild(tuple(bind(child, problem, snapshot, planner, whole) for child in expr.children))


def _computed(expr: Computed, problem: Problem, snapshot: Snapshot, planner: Planner, whole: Problem) -> Expr:
    """The leaf of a diagonal or a Nyström approximation, which take products with what is inside."""
    params = expr.domain_params

    def make() -> Expr:
        inner = simplify(bind(expr.expr, problem, snapshot, planner, whole), problem.facts).expr
        leaf = compute(expr, BoundMatrix(inner, problem, planner), snapshot, whole)
        if params is None:
            return leaf
        return restrict(leaf, params) if (entries := entries_of(params)) is None else EntryRestriction(leaf, entries)

    return problem.cached(snapshot).get("matrix", expr, make)


def _matrix_terms_here(expr: Expr) -> list[MatrixTerm]:
    """Matrix terms of an expression outside of restrictions and blocks; one pass serves all of them."""
    if isinstance(expr, MatrixTerm):
        return [expr]
    if isinstance(expr, (Restriction, BlockDiagonal)):
        return []
    return list(dict.fromkeys(term for child in expr.children for term in _matrix_terms_here(child)))


def _accumulate(terms: list[MatrixTerm], problem: Problem, snapshot: Snapshot) -> None:
    cache = problem.cached(snapshot)
    if not (missing := cache.missing("matrix", terms)):
        return
    if problem.group.sharded:
        _accumulate_by_owners(missing, problem, snapshot)
        return
    preparing = [t for t in missing if type(t).prepare is not MatrixTerm.prepare]
    sums = _sum(preparing, problem, snapshot, lambda term, batch: call(term, "prepare", batch))
    prepared = {term: call(term, "settle", total) for term, total in sums.items()}
    while missing:
        stats = _statistics(missing, problem, snapshot, prepared)
        further = {term: call(term, "repeat", stats[term], prepared.get(term)) for term in missing}
        for term in missing:
            if further[term] is None:
                cache.put("matrix", term, _finished(term, stats[term], problem.layout, prepared.get(term)))
        missing = [term for term in missing if further[term] is not None]
        prepared |= {term: further[term] for term in missing}


def _statistics(
    terms: list[MatrixTerm], problem: Problem, snapshot: Snapshot, prepared: Mapping[MatrixTerm, Any]
) -> dict[MatrixTerm, Any]:
    """The sums of one pass over the data."""
    return _sum(terms, problem, snapshot, lambda term, batch: call(term, "accumulate", batch, prepared.get(term)))


def _finished(term: MatrixTerm, stats: Any, layout: Layout, prepared: Any) -> Expr:
    """The matrix of a term.

    Raises:
        ExpressionError: it is none, or needs data itself.
    """
    matrix = term.finish(stats, layout, prepared)
    if not isinstance(matrix, Expr):
        raise ExpressionError(f"{term.label}.finish must return an expression, got {type(matrix).__name__}")
    if unbound(matrix):
        raise ExpressionError(f"{term.label}.finish must return array leaves, but {matrix} needs data itself")
    return matrix


def _accumulate_by_owners(terms: list[MatrixTerm], problem: Problem, snapshot: Snapshot) -> None:
    """Make the matrices of layers where parameters lie in parts, each by the process that owns the layer."""
    preparing = [t for t in terms if type(t).prepare is not MatrixTerm.prepare]
    sums = summed_by_owners(preparing, problem, snapshot, lambda term, batch: call(term, "prepare", batch))
    prepared = {term: settled_by_owners(term, total, problem) for term, total in sums.items()}
    nothing = None, None
    stats = summed_by_owners(
        terms, problem, snapshot, lambda t, batch: call(t, "accumulate", batch, prepared.get(t, nothing)[1])
    )
    place, cache = ownership(problem, snapshot), problem.cached(snapshot)
    for term in terms:
        own = None
        if place.on is not None:
            with activated(Group()):  # each finishes other layers: no work is dealt out
                own = _finished(term, stats[term], place.on.layout, prepared.get(term, nothing)[0])
        cache.put("matrix", term, OwnedMatrix(term, own, place))


def _sum(terms: list[MatrixTerm], problem: Problem, snapshot: Snapshot, method: Any) -> dict[MatrixTerm, Any]:
    sums = {term: problem.sum() for term in terms}
    layers = any(term.uses_layers for term in terms)
    for evaluation in _pass(problem, snapshot) if terms else ():
        if layers and evaluation.sample.index == 0:
            _rehearse(terms, evaluation)
        recorded = record_layers(evaluation) if layers else None
        batch = evaluation.evaluate() if recorded is None else recorded.batch
        for term in terms:
            sums[term].add(method(term, batch))
    return problem.totalled(sums)


def _rehearse(terms: list[MatrixTerm], evaluation: Evaluation) -> None:
    """Try the first row alone: a term that refuses the model's layers does so before a pass over the data."""
    problem, sample = evaluation.problem, evaluation.sample
    if sample.rows == 1 or problem.draws.mode == "frozen" or problem.noted(LayerNotes).compared:  # known already
        return
    try:
        # One row cannot show that gradients belong to other rows: they are compared where there are several.
        recorded = record_layers(Evaluation(problem, evaluation.snapshot, sample.head(1)), compared=False)
    except CurvalgError:  # whatever is wrong with the model, the whole batch reports it better
        return
    if recorded.batch.output.shape[0] == 1:
        for term in terms:
            term.rehearse(recorded.batch)


def _pass(problem: Problem, snapshot: Snapshot) -> Iterator[Any]:
    with problem.differentiating():
        yield from problem.evaluations(snapshot)
