"""Block-diagonals are closed under sums, shifts and products over the same partition."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Any

from curvalg.errors import ExpressionError
from curvalg.expr import Block, BlockDiagonal, Identity, IdentityExpr, Product, Sum, ZeroExpr, add, multiply
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr
from curvalg.expr.nodes.constants import zero_between

Scaled = tuple[BlockDiagonal, Fraction]


def multiple(expr: Expr) -> Fraction | None:
    """The number c of an expression that is c * Identity as it is written, else None."""
    if isinstance(expr, ZeroExpr):
        return Fraction(0)
    if isinstance(expr, IdentityExpr):
        return Fraction(1)
    return expr.shift if isinstance(expr, Sum) and not expr.coefficients else None


def partition(expr: Expr) -> Hashable | None:
    """A key that is equal for two block-diagonals that add and multiply block by block; None where nothing can."""
    if not isinstance(expr, BlockDiagonal):
        return None
    if isinstance(expr.what, Expr):
        return expr.by, expr.complete
    keys = frozenset((block.params, block.joint) for block in expr.what)
    return (keys, expr.complete) if len(keys) == len(expr.what) else None


def _parts(expr: BlockDiagonal) -> dict[Hashable, Expr]:
    """The parts that are added one by one: given blocks by their layout, or the one expression."""
    if isinstance(expr.what, Expr):
        return {None: expr.what}
    return {(block.params, block.joint): block.expr for block in expr.what}


def combined(operands: Sequence[Scaled], shift: Fraction = Fraction(0)) -> Expr | None:
    """The sum Σ cᵢ Bᵢ + shift · I over one partition, or None where the blocks are written over different restrictions."""
    first = operands[0][0]
    parts = [(_parts(operand), c) for operand, c in operands]
    try:
        return first.rebuild(
            tuple(add([*((mine[key], c) for mine, c in parts), (Identity, shift)]) for key in _parts(first))
        )
    except ExpressionError:
        return None


def of_sum(expr: Sum, loss: LossFacts | None = None) -> Expr | None:
    """Merge block-diagonals over the same partition; a single scaled one takes its coefficient inside."""
    groups: dict[Hashable, list[Scaled]] = {}
    pairs: list[tuple[Expr, Any]] = [(Identity, expr.shift), *([] if expr.space is None else [(expr.space, 1)])]
    for part, c in expr.coefficients.items():
        if (key := partition(part)) is not None and isinstance(part, BlockDiagonal):
            groups.setdefault(key, []).append((part, c))
        else:
            pairs.append((part, c))
    for operands in groups.values():
        merged = combined(operands)
        made = [combined([operand]) for operand in operands] if merged is None else [merged]
        pairs += [(part, 1) for part in made if part is not None]
    result = add(pairs)
    return None if result == expr else result


def of_shift(expr: Sum, loss: LossFacts | None) -> Expr | None:
    if not expr.shift or len(expr.coefficients) != 1:
        return None
    ((part, c),) = expr.coefficients.items()
    if not isinstance(part, BlockDiagonal) or not part.covering or partition(part) is None:
        return None
    return combined([(part, c)], expr.shift)


def of_product(expr: Product, loss: LossFacts | None) -> Expr | None:
    factors = expr.factors
    for i, (left, right) in enumerate(itertools.pairwise(factors)):
        if (key := partition(left)) is not None and key == partition(right):
            product = _product(left, right)
            if product is not None:
                return multiply([*factors[:i], product, *factors[i + 2 :]])
    return None


def _product(left: Expr, right: Expr) -> Expr | None:
    assert isinstance(left, BlockDiagonal)
    assert isinstance(right, BlockDiagonal)
    if isinstance(left.what, Expr):  # the diagonal blocks of a product are not the products of the diagonal blocks
        return None
    theirs = _parts(right)
    try:
        return left.rebuild(tuple(block @ theirs[key] for key, block in _parts(left).items()))
    except ExpressionError:
        return None


def nested(expr: BlockDiagonal, loss: LossFacts | None) -> Expr | None:
    """Replace a block that is itself made of blocks, and covered by them, by these."""
    if isinstance(expr.what, Expr):
        return None
    blocks: list[Block] = []
    for block in expr.what:
        inner = block.expr
        given = inner.what if isinstance(inner, BlockDiagonal) and inner.complete else block.expr
        movable = not isinstance(given, Expr) and not any(part.anchored for part in given)
        blocks += given if movable else [block]  # type: ignore[arg-type]
    return BlockDiagonal(tuple(blocks), None, expr.complete) if tuple(blocks) != expr.what else None


def of_multiples(expr: BlockDiagonal, loss: LossFacts | None) -> Expr | None:
    """Blocks that are multiples of the identity fit any finer partition: one block per name."""
    if isinstance(expr.what, Expr):
        return None
    blocks: list[Block] = []
    for block in expr.what:
        if (c := multiple(block.expr)) is None:
            blocks.append(block)
            continue
        plain = add([(Identity, c)])
        if expr.complete:
            blocks += [Block((name,), plain) for name in block.params]
        else:
            blocks.append(Block(block.params, plain, joint=block.joint))
    return BlockDiagonal(tuple(blocks), None, expr.complete) if tuple(blocks) != expr.what else None


def of_one_multiple(expr: BlockDiagonal, loss: LossFacts | None) -> Expr | None:
    """The multiple of the identity that every block is, if a block is everywhere."""
    multiples = {multiple(child) for child in expr.children}
    c = multiples.pop()
    if multiples or c is None or (c and not expr.covering):
        return None
    return add([(zero_between(expr, expr), 1), (Identity, c)])
