"""Sums of complete block-diagonals over different partitions.

Blocks of different operands that share a parameter fall into one component; the components partition the parameters,
and the sum is block-diagonal over them. Matrices that lie in different orders are not added entry by entry: one that is
not in the order of the sum stays a block-diagonal of one block, which says where its rows lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curvalg.errors import ExpressionError
from curvalg.expr import Block, BlockDiagonal, Identity, Sum, add
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr
from curvalg.rewrite.rules import block_rules as blocks

Names = frozenset[str]
Blocks = tuple[Block, ...]


def of_sum(expr: Sum, loss: LossFacts | None) -> Expr | None:
    """Complete block-diagonals over different partitions become one."""
    # Those over one partition come first; they take their coefficients inside.
    if blocks.of_sum(expr) is not None:
        return None
    scopes: dict[Names, dict[Expr, Blocks]] = {}
    for part in expr.coefficients:
        if isinstance(part, BlockDiagonal) and part.complete and not isinstance(part.what, Expr):
            names = frozenset(name for block in part.what for name in block.params)
            scopes.setdefault(names, {})[part] = part.what
    for operands in scopes.values():
        merged = _merged(list(operands.values())) if len(operands) > 1 else None
        if merged is not None:
            rest = [(part, c) for part, c in expr.coefficients.items() if part not in operands]
            return add([(merged, 1), *rest, (Identity, expr.shift)])
    return None


def _components(operands: Sequence[Blocks]) -> list[Names]:
    """The finest partition that every operand's blocks fit into."""
    found: list[Names] = []
    for block in (block for operand in operands for block in operand):
        overlapping = [names for names in found if not names.isdisjoint(block.params)]
        found = [names for names in found if names not in overlapping]
        found.append(frozenset(block.params).union(*overlapping))
    return found


def _within(operand: Blocks, component: Names) -> Blocks:
    return tuple(block for block in operand if block.params[0] in component)


Layout = tuple[tuple[str, ...], bool]
"""The order of a block's rows: its names, and whether they lie as [W | b]."""


def _layout(block: Block) -> Layout:
    return block.params, block.joint and len(block.params) > 1


def _merged(operands: Sequence[Blocks]) -> BlockDiagonal | None:
    components = _components(operands)
    try:
        made = [_block([_within(operand, component) for operand in operands], component) for component in components]
    except ExpressionError:  # written over different restrictions, or over the whole
        return None
    if len(made) == 1 and made[0][1] == len(operands):
        return None  # one component and no matrix in its layout: putting the operands into one block gains nothing
    return BlockDiagonal(tuple(block for block, _ in made), None, complete=True)


def _block(operands: Sequence[Blocks], component: Names) -> tuple[Block, int]:
    """The sum over one component, and how many of its operands are still block-diagonals in it."""
    pairs: list[tuple[Expr, Any]] = []
    matrices: list[Block] = []
    apart: list[Blocks] = []
    for mine in operands:
        multiples = {blocks.multiple(block.expr) for block in mine}
        if len(multiples) == 1 and None not in multiples:
            pairs.append((Identity, multiples.pop()))
        elif len(mine) == 1:
            matrices.append(mine[0])
        else:
            apart.append(mine)
    if any(block.anchored for mine in apart for block in mine):
        raise ExpressionError("a sub-matrix of the whole cannot be one of a block")
    params, joint = _common({_layout(block) for block in matrices}, component, bool(apart))
    for block in matrices:
        if _layout(block) == (params, joint):
            pairs.append((block.expr, 1))
        else:
            apart.append((block,))  # the matrix in its own layout, at the places of its names
    pairs += [(BlockDiagonal(mine, None, complete=True), 1) for mine in apart]
    return Block(params, add(pairs), joint=joint), len(apart)


def _common(layouts: set[Layout], component: Names, by_name: bool) -> Layout:
    """The layout of a sum: that of its matrices where it is one; a joint one holds nothing that lies by name."""
    if len(layouts) == 1 and not by_name:
        return next(iter(layouts))
    return min((layout for layout in layouts if not layout[1]), default=(tuple(sorted(component)), False))
