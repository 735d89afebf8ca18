"""Sums of complete block-diagonals over different partitions.

Blocks of different operands that share a parameter fall into one component; the components partition the parameters,
and the sum is block-diagonal over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curvalg.errors import ExpressionError
from curvalg.expr import Block, BlockDiagonal, Identity, Sum, add
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr
from curvalg.rewrite.rules import blocks

Names = frozenset[str]
Blocks = tuple[Block, ...]


def of_sum(expr: Expr, loss: LossFacts | None) -> Expr | None:
    """Complete block-diagonals over different partitions become one."""
    # Those over one partition come first; they take their coefficients inside.
    if not isinstance(expr, Sum) or blocks.of_sum(expr) is not None:
        return None
    scopes: dict[Names, dict[Expr, Blocks]] = {}
    for part in expr.coefficients:
        if isinstance(part, BlockDiagonal) and part.complete and not isinstance(part.what, Expr):
            names = frozenset(name for block in part.what for name in block.params)
            scopes.setdefault(names, {})[part] = part.what
    for operands in scopes.values():
        chosen = _without_conflicts(operands)
        merged = _merged(list(chosen.values())) if len(chosen) > 1 else None
        if merged is not None:
            rest = [(part, c) for part, c in expr.coefficients.items() if part not in chosen]
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


def _layout(block: Block) -> tuple[tuple[str, ...], bool]:
    return block.params, block.joint and len(block.params) > 1


def _without_conflicts(operands: dict[Expr, Blocks]) -> dict[Expr, Blocks]:
    """The operands that can be merged: matrices over one component in different layouts cannot be added."""
    while True:
        apart: set[Expr] = set()
        for component in _components(list(operands.values())):
            inside = {part: _within(operand, component) for part, operand in operands.items()}
            layouts = {part: _layout(mine[0]) for part, mine in inside.items() if len(mine) == 1}
            if len(set(layouts.values())) > 1:
                apart.update(layouts)
        if not apart:
            return operands
        operands = {part: operand for part, operand in operands.items() if part not in apart}


def _merged(operands: Sequence[Blocks]) -> BlockDiagonal | None:
    components = _components(operands)
    if len(components) == 1 and all(len(operand) > 1 for operand in operands):
        return None  # one component and no matrix over all of it: putting the operands into one block gains nothing
    try:
        return BlockDiagonal(tuple(_block(operands, component) for component in components), None, complete=True)
    except ExpressionError:  # written over different restrictions
        return None


def _block(operands: Sequence[Blocks], component: Names) -> Block:
    pairs: list[tuple[Expr, Any]] = []
    params, joint = tuple(sorted(component)), False
    for operand in operands:
        mine = _within(operand, component)
        multiples = {blocks.multiple(block.expr) for block in mine}
        if len(mine) == 1:
            params, joint = _layout(mine[0])
            pairs.append((mine[0].expr, 1))
        elif len(multiples) == 1 and None not in multiples:
            pairs.append((Identity, multiples.pop()))
        else:
            pairs.append((BlockDiagonal(mine, None, complete=True), 1))
    return Block(params, add(pairs), joint=joint)
