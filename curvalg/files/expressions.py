"""Expressions as text, with array leaves beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from curvalg.errors import CurvalgError, ExpressionError
from curvalg.expr import BlockDiagonal, Expr
from curvalg.expr.nodes.arrays import ArrayLeaf
from curvalg.expr.show.text import text
from curvalg.files.leaves import PARTS, Described, describe_leaf, read_leaf
from curvalg.registry.parse import parse


class Array(ArrayLeaf):
    """Something that prints as ``Array<0>``, in the place of an array leaf.

    Args:
        number: to print.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def describe(self) -> str:
        return str(self.number)


def describe_expression(expr: Expr, tensors: dict[str, Tensor]) -> Described:
    """The description of an expression; arrays go to ``tensors``.

    Raises:
        ExpressionError: it cannot be read back from its text, as one of a term that is not registered.
    """
    found = list(dict.fromkeys(node for node in expr.walk() if isinstance(node, ArrayLeaf)))
    if foreign := sorted({type(leaf).__name__ for leaf in found if type(leaf) not in PARTS}):
        raise ExpressionError(
            f"cannot write {foreign} to a file, which holds {', '.join(kind.__name__ for kind in PARTS)}; make the matrix of "
            "these"
        )
    stand_ins = {leaf: Array(number) for number, leaf in enumerate(found)}
    names = {leaf: text(array) for leaf, array in stand_ins.items()}
    shown = text(_replaced(expr, stand_ins))
    try:
        same = parse(shown, leaves={name: leaf for leaf, name in names.items()}) == completed(expr, [])
    except CurvalgError as error:
        raise ExpressionError(
            f"cannot write an expression that cannot be read back from its text: {error}. A term is read by its registered "
            "name; bind the expression to a problem first, expr.bound(problem), so that it holds arrays alone"
        ) from error
    if not same:
        raise ExpressionError(
            f"cannot write {expr}: read back from its text it is another expression; bind it to a problem first, "
            "expr.bound(problem), or write its parts"
        )
    return {
        "text": shown,
        "leaves": {name: describe_leaf(leaf, name, tensors) for leaf, name in names.items()},
        "complete": [_names(node) for node in expr.walk() if isinstance(node, BlockDiagonal) and node.complete],
    }


def read_expression(described: Described, tensors: Mapping[str, Tensor]) -> Expr:
    """The expression of a description.

    Raises:
        Exception: of any kind, for what is no description.
    """
    leaves: dict[str, Expr] = {name: read_leaf(leaf, tensors) for name, leaf in described["leaves"].items()}
    return completed(parse(described["text"], leaves=leaves), described["complete"])


def _names(expr: BlockDiagonal) -> list[list[str]]:
    """The parameters of every block, in an order that is theirs alone."""
    return sorted(list(block.params) for block in expr.what) if isinstance(expr.what, tuple) else []


def completed(expr: Expr, known: Sequence[list[list[str]]]) -> Expr:
    """The expression whose block-diagonals count as complete where the parameters of their blocks are known to be all."""
    if not any(isinstance(node, BlockDiagonal) for node in expr.walk()):
        return expr
    if isinstance(expr, BlockDiagonal) and isinstance(expr.what, tuple):
        inner = expr.rebuild(tuple(completed(part, known) for part in expr.children))
        assert isinstance(inner, BlockDiagonal)
        return BlockDiagonal(inner.what, None, _names(expr) in known)
    return expr.rebuild(tuple(completed(part, known) for part in expr.children))


def _replaced(expr: Expr, by: Mapping[Any, Expr]) -> Expr:
    if isinstance(expr, ArrayLeaf):
        return by[expr]
    return expr.rebuild(tuple(_replaced(part, by) for part in expr.children)) if expr.children else expr
