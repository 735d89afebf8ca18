"""Expressions as arrays alone: what they hold no longer depends on a model, a loss or data."""

from __future__ import annotations

from curvalg.errors import ExpressionError
from curvalg.expr import Block, BlockDiagonal, EntryRestriction, Expr, Kronecker, Restriction, restrict
from curvalg.expr.term import needs_model
from curvalg.lowering.blocks.submatrices import block_problem
from curvalg.lowering.inverses import forms
from curvalg.lowering.inverses.offer import BoundMatrix
from curvalg.lowering.matrices import DenseMatrix
from curvalg.problem import Snapshot


def explicit(matrix: BoundMatrix, snapshot: Snapshot) -> Expr:
    """The expression with arrays in the place of all that products are taken of.

    Sums, inverses, roots and blocks stay as they are written; a term of which only products are known becomes a dense matrix,
    wherever it has no more rows than are ever built.

    Args:
        matrix: whose matrix terms are bound.
        snapshot: the state.

    Raises:
        ExpressionError: a term has too many rows, or acts on outputs.
    """
    expr = matrix.expr
    if not needs_model(expr):
        return expr
    if isinstance(expr, BlockDiagonal) and isinstance(expr.what, tuple):
        blocks = [(b, matrix.of(b.expr, block_problem(matrix.problem, b))) for b in expr.what]
        made = tuple(Block(b.params, explicit(inner, snapshot), joint=b.joint) for b, inner in blocks)
        return BlockDiagonal(made, None, expr.complete)
    if isinstance(expr, EntryRestriction):
        return expr.rebuild((explicit(matrix.of(expr.expr), snapshot),))
    side, parts = (expr.domain, expr.domain_params), expr.children
    if parts and not isinstance(expr, Restriction) and all(_acts_on(part, side) for part in parts):
        return expr.rebuild(tuple(explicit(matrix.of(part), snapshot) for part in parts))
    return _built(matrix, snapshot)


def _acts_on(expr: Expr, side: tuple[object, object]) -> bool:
    """Whether an expression is square on a space, or of any size."""
    sides = (expr.domain, expr.domain_params), (expr.codomain, expr.codomain_params)
    return all(own == side or own[0] is None for own in sides)


def _built(matrix: BoundMatrix, snapshot: Snapshot) -> Expr:
    expr = matrix.expr
    if expr.domain != "parameters" or expr.codomain != "parameters" or expr.domain_params != expr.codomain_params:
        raise ExpressionError(
            f"{expr} acts between parameters and outputs, so that it is of the data it was made with; bound expressions are "
            "matrices on parameters, such as jacobian.T @ jacobian"
        )
    if matrix.size > forms.DENSE_LIMIT:
        raise ExpressionError(
            f"{expr} is known by its products alone, and {matrix.size} rows are more than the {forms.DENSE_LIMIT} that are "
            "built; bind an approximation that is made of arrays: nystrom(A, rank), diagonal_part(A), "
            "block_diagonal(A, by='module'), or a term such as kfac"
        )
    structure = forms.dense(matrix, snapshot)
    assert isinstance(structure, DenseMatrix)
    leaf = Kronecker(structure.matrix.to(matrix.problem.dtype))
    if (params := expr.domain_params) is None:
        return leaf
    names = tuple(matrix.problem.restricted(params).layout.names)
    return restrict(BlockDiagonal((Block(names, leaf),), None, True), params)
