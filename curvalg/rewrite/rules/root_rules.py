"""Right sides of the laws for square roots."""

from __future__ import annotations

import math
from fractions import Fraction

from curvalg.expr import Block, BlockDiagonal, Identity, Product, SquareRoot, Sum, add, multiply, sqrt
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr


def squared(expr: Product, loss: LossFacts | None) -> Expr | None:
    factors = expr.factors
    for i, root in enumerate(factors[:-1]):
        if isinstance(root, SquareRoot) and factors[i + 1] == root:
            return multiply([*factors[:i], root.expr, *factors[i + 2 :]])
    return None


def of_blocks(expr: SquareRoot, loss: LossFacts | None) -> Expr | None:
    # What no block covers is zero, and so is its root.
    if not isinstance(blocks := expr.expr, BlockDiagonal):
        return None
    if isinstance(blocks.what, Expr):
        return None
    roots = tuple(Block(block.params, sqrt(block.expr), joint=block.joint) for block in blocks.what)
    return BlockDiagonal(roots, None, blocks.complete)


def of_identity(expr: SquareRoot, loss: LossFacts | None) -> Expr | None:
    if not isinstance(total := expr.expr, Sum) or total.coefficients:
        return None
    root = Fraction(math.isqrt(total.shift.numerator), math.isqrt(total.shift.denominator))
    if root * root != total.shift:
        return None
    return add([(total.space or Identity, 1 if total.space else 0), (Identity, root)])
