"""Block-diagonal expressions on a problem: every block by the full names of its parameters, and all of them covered."""

from __future__ import annotations

from curvalg.errors import ExpressionError
from curvalg.expr import Block, BlockDiagonal, Expr, Inverse, Restriction, Zero, inverse, restrict
from curvalg.lowering.submatrices import block_problem, inside, is_local, partition, submatrix
from curvalg.problem import Problem
from curvalg.problem import parameters as params_
from curvalg.rewrite import simplify


def resolve(expr: Expr, problem: Problem) -> Expr:
    """The same matrix with complete block-diagonals: disjoint blocks with full names that cover every parameter.

    Laws need that knowledge: a multiple of the identity may only move into blocks that cover everything.

    Raises:
        ExpressionError: blocks that overlap.
        ProblemError: a pattern that matches no parameter.
    """
    if isinstance(expr, BlockDiagonal):
        return expr if expr.complete and isinstance(expr.what, tuple) else _complete(expr, problem)
    if not _has_blocks(expr):
        return expr
    if isinstance(expr, Restriction):
        on = problem.restricted(expr.params) if is_local(expr.expr) else problem
        return submatrix(resolve(expr.expr, on), expr.params, on)
    if isinstance(expr, Inverse) and expr.preconditioner is not None:
        options = {**expr.options, "preconditioner": resolve(expr.preconditioner, problem)}
        return inverse(resolve(expr.expr, problem), **options)
    return expr.rebuild(tuple(resolve(child, problem) for child in expr.children))


def _has_blocks(expr: Expr) -> bool:
    parts = [*expr.children]
    if isinstance(expr, Inverse) and expr.preconditioner is not None:
        parts.append(expr.preconditioner)
    return isinstance(expr, BlockDiagonal) or any(map(_has_blocks, parts))


def _complete(expr: BlockDiagonal, problem: Problem) -> BlockDiagonal:
    names = problem.layout.names
    whole = expr.what if isinstance(expr.what, Expr) else None
    given = [Block(g, whole) for g in partition(expr.by, problem)] if whole is not None else expr.what
    assert isinstance(given, (list, tuple))
    seen: dict[str, str] = {}
    blocks: list[Block] = []
    for block in given:
        label = ", ".join(block.params)
        # A joint block says itself which is the weight; other blocks lie in the order of the problem.
        own = (
            [name for pattern in block.params for name in params_.match([pattern], names)]
            if block.joint
            else params_.match(block.params, names)
        )
        for name in own:
            if name in seen:
                raise ExpressionError(
                    f"blocks must not overlap, but {name!r} is in those of {seen[name]!r} and {label!r}"
                )
            seen[name] = label
        blocks.append(_block(tuple(own), block, whole is not None, problem))
    blocks += [Block((name,), Zero) for name in names if name not in seen]
    return BlockDiagonal(tuple(blocks), None, True)


def _block(names: tuple[str, ...], block: Block, is_part: bool, problem: Problem) -> Block:
    """A block whose expression is about its own parameters wherever that is the same."""
    expr = simplify(restrict(block.expr, names) if is_part else block.expr, problem.facts).expr
    if (params := expr.domain_params) is not None:
        if params_.match(params, problem.layout.names) != params_.match(names, problem.layout.names):
            raise ExpressionError(
                f"the block over {list(names)} holds an expression restricted to {list(params)}; they must be the same"
            )
        expr, _ = inside(expr, problem)
    named = Block(names, expr, joint=block.joint)
    return Block(names, resolve(expr, block_problem(problem, named)), joint=block.joint)
