"""Binding matrix terms: one pass (two where a term prepares) that turns each into a structured expression."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from curvalg.errors import ExpressionError
from curvalg.expr import Block, BlockDiagonal, Inverse, Restriction, inverse
from curvalg.expr.node import Expr
from curvalg.expr.term import MatrixTerm
from curvalg.lowering.planner import is_local, matrix_terms, partition
from curvalg.problem import Problem, Snapshot, trees


def bind(expr: Expr, problem: Problem, snapshot: Snapshot) -> Expr:
    """The expression with every matrix term replaced by what it finishes as.

    Matrices are kept on the problem, so that an expression that differs only in other parts reuses them.
    """
    if isinstance(expr, MatrixTerm):
        return _matrix(expr, problem, snapshot)
    if not matrix_terms(expr):
        return expr
    if isinstance(expr, Restriction) and is_local(expr.expr):
        # The methods of a term see the restricted problem only; the finished matrix is square in it already.
        inner = bind(expr.expr, problem.restricted(expr.params), snapshot)
        return expr.rebuild((inner,))
    if isinstance(expr, BlockDiagonal) and (not isinstance(expr.what, Expr) or is_local(expr.what)):
        return _bind_blocks(expr, problem, snapshot)
    _accumulate(matrix_terms_here(expr), problem, snapshot)
    if isinstance(expr, Inverse):
        options = expr.options
        if expr.preconditioner is not None:
            options["preconditioner"] = bind(expr.preconditioner, problem, snapshot)
        return inverse(bind(expr.expr, problem, snapshot), **options)
    return expr.rebuild(tuple(bind(child, problem, snapshot) for child in expr.children))


def matrix_terms_here(expr: Expr) -> list[MatrixTerm]:
    """Matrix terms of an expression outside of restrictions and blocks."""
    if isinstance(expr, MatrixTerm):
        return [expr]
    if isinstance(expr, (Restriction, BlockDiagonal)):
        return []
    return list(dict.fromkeys(term for child in expr.children for term in matrix_terms_here(child)))


def _bind_blocks(expr: BlockDiagonal, problem: Problem, snapshot: Snapshot) -> Expr:
    if isinstance(expr.what, Expr):
        blocks = [Block(group, expr.what) for group in partition(expr.by, problem)]
    else:
        blocks = list(expr.what)
    bound = [Block(b.params, bind(b.expr, problem.restricted(b.params), snapshot), joint=b.joint) for b in blocks]
    return BlockDiagonal(tuple(bound), None)


def _matrix(term: MatrixTerm, problem: Problem, snapshot: Snapshot) -> Expr:
    _accumulate([term], problem, snapshot)
    return problem.kept(snapshot)["matrix", term]  # type: ignore[no-any-return]


def _accumulate(terms: list[MatrixTerm], problem: Problem, snapshot: Snapshot) -> None:
    kept = problem.kept(snapshot)
    missing = [term for term in terms if ("matrix", term) not in kept]
    if not missing:
        return
    preparing = [t for t in missing if type(t).prepare is not MatrixTerm.prepare]
    prepared = _sum(preparing, problem, snapshot, lambda term, batch: term.prepare(batch))
    stats = _sum(missing, problem, snapshot, lambda term, batch: term.accumulate(batch, prepared.get(term)))
    for term in missing:
        matrix = term.finish(stats[term], problem.layout, prepared.get(term))
        if not isinstance(matrix, Expr):
            raise ExpressionError(f"{term.label}.finish must return an expression, got {type(matrix).__name__}")
        if matrix_terms(matrix):
            raise ExpressionError(f"{term.label}.finish must return array leaves, but {matrix} has matrix terms in it")
        kept["matrix", term] = matrix


def _sum(terms: list[MatrixTerm], problem: Problem, snapshot: Snapshot, method: Any) -> dict[MatrixTerm, Any]:
    sums: dict[MatrixTerm, Any] = dict.fromkeys(terms)
    for evaluation in _pass(problem, snapshot) if terms else ():
        batch = evaluation.evaluate()
        for term in terms:
            sums[term] = trees.add(sums[term], method(term, batch))
    return sums


def _pass(problem: Problem, snapshot: Snapshot) -> Iterator[Any]:
    with problem.differentiating():
        yield from problem.evaluations(snapshot)
