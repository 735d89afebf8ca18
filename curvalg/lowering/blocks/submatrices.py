"""Sub-matrices and blocks: their places, and whether differentiating the chosen parameters alone gives them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import curvalg.expr as alg
from curvalg.errors import ExpressionError
from curvalg.expr import Block, Expr, Partition
from curvalg.expr.entries import entries_of
from curvalg.expr.nodes.arrays import ArrayLeaf
from curvalg.expr.term import GradientTerm, MatrixTerm, Term
from curvalg.expr.terms import Jacobian, LossHessian
from curvalg.lowering.blocks.rows import RowRanges, merged
from curvalg.problem import Problem
from curvalg.problem.model import parameters as params_


def is_local(expr: Expr) -> bool:
    """Whether an expression's sub-matrix is what it gives when only the chosen parameters are differentiated."""
    if isinstance(expr, (alg.Sum, alg.Transpose, alg.DiagonalPart)):
        return all(map(is_local, expr.children))
    if isinstance(expr, MatrixTerm):
        return expr.local
    return isinstance(expr, (Term, GradientTerm, Jacobian, LossHessian, alg.IdentityExpr, alg.ZeroExpr))


def is_inside(expr: Expr, restricted: Problem, problem: Problem) -> bool:
    """Whether the sub-matrix of an expression is that expression on the restricted problem.

    So it is for local expressions, and for arrays that were made over the restricted parameters already (a bound matrix
    term).
    """
    if is_local(expr):
        return True
    sizes = _sizes(expr, problem)
    return sizes == {restricted.size} != {problem.size}


def _sizes(expr: Expr, problem: Problem) -> set[int]:
    """Numbers of rows of the array leaves and complete block-diagonals in an expression."""
    if isinstance(expr, ArrayLeaf):
        return {expr.size}
    if isinstance(expr, alg.BlockDiagonal) and any(block.anchored for block in _given(expr)):
        return {problem.size}
    if isinstance(expr, alg.BlockDiagonal) and expr.complete and isinstance(expr.what, tuple):
        shapes = problem.layout.shapes
        return {sum(shapes[name].numel() for block in expr.what for name in block.params if name in shapes)}
    if isinstance(expr, (alg.Restriction, alg.BlockDiagonal)):
        return set()
    return {size for child in expr.children for size in _sizes(child, problem)}


def _given(expr: alg.BlockDiagonal) -> tuple[Block, ...]:
    return expr.what if isinstance(expr.what, tuple) else ()


def inside(expr: Expr, problem: Problem) -> tuple[Expr, Problem]:
    """A square expression on restricted parameters as one on the restricted problem, where that is the same.

    restrict(A, p) + c I becomes A + c I on the problem over p, so that whatever is known of A can be used.
    """
    params = expr.domain_params
    if params is None or expr.domain != expr.codomain or entries_of(params) is not None:
        return expr, problem
    restricted = problem.restricted(params)
    total = expr if isinstance(expr, alg.Sum) else alg.Sum({expr: Fraction(1)}, Fraction(0))
    parts: list[tuple[Expr, Fraction]] = []
    for part, c in total.coefficients.items():
        if not isinstance(part, alg.Restriction) or not is_inside(part.expr, restricted, problem):
            return expr, problem
        parts.append((part.expr, c))
    return alg.add([*parts, (alg.Identity, total.shift)]), restricted


def submatrix(whole: Expr, params: tuple[str, ...], problem: Problem) -> Expr:
    """restrict(whole, params); of a complete block-diagonal by its blocks, where none of them is cut in two."""
    if isinstance(whole, alg.BlockDiagonal) and whole.complete and isinstance(whole.what, tuple):
        names = set(params_.match(params, problem.layout.names))
        found = tuple(block for block in whole.what if names.intersection(block.params))
        movable = not any(block.anchored for block in found)
        if movable and len(found) < len(whole.what) and all(names.issuperset(block.params) for block in found):
            whole = alg.BlockDiagonal(found, None, True)
    return alg.restrict(whole, params)


def places(problem: Problem, names: Sequence[str]) -> RowRanges:
    """The rows of some parameters, one after the other."""
    return RowRanges(merged([problem.layout.slices[name] for name in names]))


def block_places(problem: Problem, block: Block) -> RowRanges:
    """The rows of a block, in its order.

    A joint block lies as the rows of [W | b]: all inputs of an output, then its bias.

    Raises:
        ExpressionError: a joint block that is not a weight and a bias.
    """
    if not block.joint:
        return places(problem, params_.match(block.params, problem.layout.names))
    names = [name for pattern in block.params for name in params_.match([pattern], problem.layout.names)]
    shapes = [tuple(problem.layout.shapes[name]) for name in names]
    if len(names) != 2 or len(shapes[1]) != 1 or not shapes[0] or shapes[0][0] != shapes[1][0]:
        raise ExpressionError(
            f"a joint block is a weight (out, ...) and its bias (out,), in this order; {list(block.params)} are "
            f"{dict(zip(names, shapes, strict=True))}"
        )
    return RowRanges(tuple(problem.layout.slices[name] for name in names), outputs=shapes[0][0])


def block_problem(problem: Problem, block: Block) -> Problem:
    """The problem of a block's expression: over its parameters alone, or over all where it is a sub-matrix of the whole."""
    return problem if block.expr.domain_params is not None else problem.restricted(block.params)


def partition(by: Partition | None, problem: Problem) -> list[tuple[str, ...]]:
    """Groups of parameter names, from names or patterns."""
    names = problem.layout.names
    if by == "parameter":
        return [(name,) for name in names]
    if by == "module":
        owners: dict[str, list[str]] = {}
        for name in names:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        return [tuple(group) for group in owners.values()]
    return [group for group in by or () if isinstance(group, tuple)]
