"""Right sides of the laws for diagonal parts."""

from __future__ import annotations

from curvalg.expr import (
    Block,
    BlockDiagonal,
    Diagonal,
    DiagonalPart,
    Identity,
    Sum,
    Transpose,
    add,
    diagonal_part,
)
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr


def of_sum(expr: DiagonalPart, loss: LossFacts | None) -> Expr | None:
    if not isinstance(total := expr.expr, Sum):
        return None
    parts = [(diagonal_part(part), c) for part, c in total.coefficients.items()]
    space = [] if total.space is None else [(total.space, 1)]
    return add([*parts, *space, (Identity, total.shift)])


def of_diagonal(expr: DiagonalPart, loss: LossFacts | None) -> Expr | None:
    return expr.expr if isinstance(expr.expr, (DiagonalPart, Diagonal)) else None


def of_transpose(expr: DiagonalPart, loss: LossFacts | None) -> Expr | None:
    if isinstance(expr.expr, Transpose):
        return diagonal_part(expr.expr.expr)
    return None


def of_blocks(expr: DiagonalPart, loss: LossFacts | None) -> Expr | None:
    if not isinstance(blocks := expr.expr, BlockDiagonal):
        return None
    if isinstance(blocks.what, Expr):
        return diagonal_part(blocks.what) if blocks.covering else None
    diagonals = tuple(Block(block.params, diagonal_part(block.expr), joint=block.joint) for block in blocks.what)
    return BlockDiagonal(diagonals, None, blocks.complete)
