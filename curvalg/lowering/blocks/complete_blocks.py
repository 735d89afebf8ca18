"""Block-diagonal expressions on a problem: blocks by the full names of their parameters, and every parameter in one."""

from __future__ import annotations

from curvalg.errors import ExpressionError
from curvalg.expr import Block, BlockDiagonal, Expr, Restriction, Zero, restrict
from curvalg.expr.entries import entries_of
from curvalg.expr.nodes.composite import settled
from curvalg.expr.term import NamedExpr
from curvalg.lowering.blocks.submatrices import block_problem, inside, is_inside, partition, submatrix
from curvalg.problem import Problem
from curvalg.problem.model import parameters as params_
from curvalg.rewrite import simplify


def resolve(expr: Expr, problem: Problem) -> Expr:
    """The matrix with complete block-diagonals: disjoint blocks with full names that cover every parameter.

    Laws need that knowledge: a multiple of the identity may only move into blocks that cover everything.

    Raises:
        ExpressionError: blocks that overlap.
        ProblemError: a pattern that matches no parameter.
    """
    if isinstance(expr, BlockDiagonal):
        return _covering(expr, problem) if expr.complete and isinstance(expr.what, tuple) else _complete(expr, problem)
    if not _has_blocks(expr):
        return expr
    if isinstance(expr, Restriction):
        restricted = problem.restricted(expr.params)
        on = restricted if is_inside(expr.expr, restricted, problem) else problem
        return submatrix(resolve(expr.expr, on), expr.params, on)
    return expr.rebuild(tuple(resolve(part, problem) for part in expr.children))


def _covering(expr: BlockDiagonal, problem: Problem) -> BlockDiagonal:
    """Complete blocks, which may have been made on another problem, found to cover this one."""
    assert isinstance(expr.what, tuple)
    there, here = {name for block in expr.what for name in block.params}, set(problem.layout.names)
    if there != here:
        raise ExpressionError(
            "the blocks were made over the parameters of another problem, which had in addition "
            f"{sorted(there - here) or 'none'} and lacked {sorted(here - there) or 'none'}; choose the same ones with params=, "
            "or make the matrix on this problem"
        )
    return expr


def _has_blocks(expr: Expr) -> bool:
    if not expr.children:
        return False
    return settled(expr, "blocks", lambda node: isinstance(node, BlockDiagonal) or any(map(_has_blocks, node.children)))


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
        if (entries := entries_of(params)) is not None:
            raise ExpressionError(
                f"the block over {list(names)} holds a sub-matrix over {entries}, but blocks are over whole parameters; "
                "restrict the block-diagonal matrix instead: restrict(block_diagonal(A), entries)"
            )
        if params_.match(params, problem.layout.names) != params_.match(names, problem.layout.names):
            raise ExpressionError(
                f"the block over {list(names)} holds an expression restricted to {list(params)}; they must be the same"
            )
        expr, _ = inside(expr, problem)
    named = Block(names, expr, joint=block.joint)
    if block.joint and _lies_by_name(expr):
        named = Block(tuple(params_.match(names, problem.layout.names)), _by_name(expr, names))
    return Block(named.params, resolve(named.expr, block_problem(problem, named)), joint=named.joint)


def _lies_by_name(expr: Expr) -> bool:
    """Whether something in an expression has rows in the order of the problem: a term, a sub-matrix, blocks."""
    return any(isinstance(node, (NamedExpr, Restriction, BlockDiagonal)) for node in expr.walk())


def _by_name(expr: Expr, names: tuple[str, ...]) -> Expr:
    """The matrix of a joint block with its rows in the order of the problem: arrays in it become joint blocks themselves.

    Reordering rows and columns alike goes through sums, products, inverses and all that an expression is made of.
    """
    given = isinstance(expr, BlockDiagonal) and isinstance(expr.what, tuple)  # blocks over names of their own
    if expr.domain is None or given or isinstance(expr, (NamedExpr, Restriction)):
        return expr
    if not _lies_by_name(expr):
        return BlockDiagonal((Block(names, expr, joint=True),), None, True)
    return expr.rebuild(tuple(_by_name(part, names) for part in expr.children))
