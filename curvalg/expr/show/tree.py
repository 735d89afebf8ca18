"""Expressions printed as indented trees."""

from __future__ import annotations

from fractions import Fraction
from functools import singledispatch

from curvalg.expr.node import Expr
from curvalg.expr.nodes.approximations import DiagonalEstimate, DiagonalPart
from curvalg.expr.nodes.block_diagonal import Block, BlockDiagonal
from curvalg.expr.nodes.constants import Identity
from curvalg.expr.nodes.inverse import Inverse
from curvalg.expr.nodes.restrictions import EntryRestriction, Restriction
from curvalg.expr.nodes.roots import SquareRoot
from curvalg.expr.nodes.sums import Sum
from curvalg.expr.show.text import changed, number, patterns, text

Branch = tuple[str, Expr]
"""What stands before a child, and the child."""


def tree(expr: Expr) -> str:
    """Text with one node a line, the children indented below it."""
    return "\n".join(_lines(expr, "", ""))


def _lines(expr: Expr, first: str, rest: str) -> list[str]:
    head, branches = _node(expr)
    lines = [first + head]
    for i, (label, child) in enumerate(branches):
        stem, pad = ("└─ ", "   ") if i == len(branches) - 1 else ("├─ ", "│  ")
        lines += _lines(child, rest + stem + label, rest + pad)
    return lines


@singledispatch
def _node(expr: Expr) -> tuple[str, list[Branch]]:
    if not expr.children:
        return text(expr), []
    head = f"{type(expr).__name__.lower()}{_options(expr, 'expr', 'factors')}"
    return head, [("", child) for child in expr.children]


@_node.register
def _(expr: Inverse) -> tuple[str, list[Branch]]:
    return f"inverse{_options(expr, 'expr')}", [("", expr.expr)]


def _options(expr: Expr, *skip: str) -> str:
    options = changed(expr, skip=skip)
    return f" {', '.join(f'{k}={v}' for k, v in options.items())}" if options else ""


@_node.register
def _(expr: Sum) -> tuple[str, list[Branch]]:
    branches: list[Branch] = [(_factor(c), child) for child, c in expr.coefficients.items()]
    if expr.space is not None:
        branches.append(("", expr.space))
    if expr.shift:
        branches.append((_factor(expr.shift), Identity))
    return "sum", branches


def _factor(coefficient: Fraction) -> str:
    sign = "-" if coefficient < 0 else ""
    return sign if abs(coefficient) == 1 else f"{sign}{number(abs(coefficient))} * "


@_node.register
def _(expr: SquareRoot) -> tuple[str, list[Branch]]:
    return "sqrt", [("", expr.expr)]


@_node.register(DiagonalPart)
@_node.register(DiagonalEstimate)
def _(expr: DiagonalPart | DiagonalEstimate) -> tuple[str, list[Branch]]:
    return f"diagonal_part{_options(expr, 'expr')}", [("", expr.expr)]


@_node.register
def _(expr: Restriction) -> tuple[str, list[Branch]]:
    return f"restrict {patterns(expr.params)}", [("", expr.expr)]


@_node.register
def _(expr: EntryRestriction) -> tuple[str, list[Branch]]:
    return f"restrict {expr.entries}", [("", expr.expr)]


@_node.register
def _(expr: BlockDiagonal) -> tuple[str, list[Branch]]:
    if isinstance(expr.what, Expr):
        return f"block_diagonal{_options(expr, 'what', 'complete')}", [("", expr.what)]
    return "block_diagonal", [(_block(block), block.expr) for block in expr.what]


def _block(block: Block) -> str:
    return f"{patterns(block.params)}{' joint' if block.joint else ''}: "
