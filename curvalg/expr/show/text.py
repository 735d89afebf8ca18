"""Expressions as text: :func:`text` gives what :func:`curvalg.parse` reads back."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from functools import singledispatch
from typing import Any

from curvalg.expr.node import Expr
from curvalg.expr.nodes.approximations import DiagonalEstimate, DiagonalPart, Nystrom
from curvalg.expr.nodes.arrays import ArrayLeaf
from curvalg.expr.nodes.block_diagonal import Block, BlockDiagonal
from curvalg.expr.nodes.composite import settled
from curvalg.expr.nodes.constants import IdentityExpr, ZeroExpr
from curvalg.expr.nodes.inverse import Inverse
from curvalg.expr.nodes.products import Product
from curvalg.expr.nodes.restrictions import EntryRestriction, Restriction
from curvalg.expr.nodes.roots import SquareRoot
from curvalg.expr.nodes.sums import Sum
from curvalg.expr.nodes.transposes import Transpose
from curvalg.expr.term import NamedExpr

# Binding strengths, weakest first, as in Python's own grammar.
SUM, PRODUCT, ATOM = 0, 1, 2


def text(expr: Expr) -> str:
    """The expression in the syntax of the command line and of :func:`curvalg.parse`."""
    return _bound(expr)[0]


MAX_LENGTH = 100_000
"""The longest text; of what is longer (as where parts occur in parts over and over) only the kind is shown."""


def _bound(expr: Expr) -> tuple[str, int]:
    """The text and how strongly it binds; kept with a node that has parts."""
    return settled(expr, "text", _short) if expr.children else _text(expr)


def _short(expr: Expr) -> tuple[str, int]:
    shown, strength = _text(expr)
    if len(shown) <= MAX_LENGTH:
        return shown, strength
    return f"<{type(expr).__name__.lower()} of more than {MAX_LENGTH} characters>", ATOM


def _wrapped(expr: Expr, strength: int) -> str:
    shown, own = _bound(expr)
    return shown if own >= strength else f"({shown})"


_LONG = 10**30
"""Whole numbers from here on are shown with an exponent."""


def number(value: Fraction) -> str:
    """A positive fraction as the shortest decimal if it has one, else as p or p/q."""
    if value.denominator == 1 and value < _LONG:
        return str(value.numerator)
    decimal = _decimal(value)
    if decimal and Fraction(decimal) == value:
        return decimal
    return str(value)


def _decimal(value: Fraction) -> str:
    """The nearest float as text; empty beyond the range of floats."""
    try:
        return repr(float(value)) if float(value) else ""
    except OverflowError:
        return ""


def _scaled(coefficient: Fraction, factor: str) -> str:
    """|coefficient| times a factor, as ``2*A``, ``0.1*A``, ``A / 3`` or ``2*A / 3``."""
    coefficient = abs(coefficient)
    shown = number(coefficient)
    if "/" not in shown:
        return factor if coefficient == 1 else f"{shown}*{factor}"
    numerator, denominator = shown.split("/")
    return f"{factor} / {denominator}" if numerator == "1" else f"{numerator}*{factor} / {denominator}"


def join(parts: list[tuple[bool, str]]) -> str:
    """Join summands, each with whether it is subtracted, to one text."""
    (negative, first), *rest = parts
    shown = f"-{first}" if negative else first
    return shown + "".join(f" {'-' if minus else '+'} {part}" for minus, part in rest)


@singledispatch
def _text(expr: Expr) -> tuple[str, int]:
    return f"{type(expr).__name__}", ATOM


@_text.register
def _(expr: IdentityExpr) -> tuple[str, int]:
    return "identity", ATOM


@_text.register
def _(expr: ZeroExpr) -> tuple[str, int]:
    if expr.domain is None:
        return "zero", ATOM
    spaces = [repr(expr.codomain), repr(expr.domain)]
    sides = {"codomain_params": expr.codomain_params, "domain_params": expr.domain_params}
    restricted = {name: params for name, params in sides.items() if params}
    if not restricted:
        return call("zero", spaces, {}), ATOM
    chosen = set(restricted.values())
    if len(chosen) == 1 and len(restricted) == (expr.codomain, expr.domain).count("parameters"):
        return call("restrict", [call("zero", spaces, {}), patterns(*chosen)], {}), ATOM
    return call("zero", spaces, {name: _names(params) for name, params in restricted.items()}), ATOM


@_text.register
def _(expr: Sum) -> tuple[str, int]:
    parts: list[tuple[bool, str]] = []
    for e, c in expr.coefficients.items():
        # A number or a sign in front of (A + B) @ C would be read as the sum's own.
        bare = abs(c) == 1 and not (c < 0 and not parts)
        leading_sum = isinstance(e, Product) and isinstance(e.factors[0], Sum)
        shown = _wrapped(e, ATOM if leading_sum and not bare else PRODUCT)
        parts.append((c < 0, _scaled(c, shown)))
    if expr.space is not None:
        parts.append((False, text(expr.space)))
    if expr.shift:
        parts.append((expr.shift < 0, _scaled(expr.shift, "identity")))
    return join(parts), SUM if len(parts) > 1 or parts[0][0] else PRODUCT


@_text.register
def _(expr: Product) -> tuple[str, int]:
    # A scaled factor would lend its number to the whole product when read back, so it is wrapped like a sum.
    return " @ ".join(_wrapped(f, ATOM) for f in expr.factors), PRODUCT


@_text.register
def _(expr: Transpose) -> tuple[str, int]:
    return f"{_wrapped(expr.expr, ATOM)}.T", ATOM


@_text.register
def _(expr: Inverse) -> tuple[str, int]:
    options = changed(expr, skip=("expr",))
    if isinstance(expr.expr, SquareRoot) and not options:
        return call("inv_sqrt", [text(expr.expr.expr)], {}), ATOM
    return call("inverse", [text(expr.expr)], options), ATOM


@_text.register
def _(expr: SquareRoot) -> tuple[str, int]:
    return call("sqrt", [text(expr.expr)], {}), ATOM


@_text.register
def _(expr: DiagonalPart) -> tuple[str, int]:
    return call("diagonal_part", [text(expr.expr)], {}), ATOM


@_text.register
def _(expr: DiagonalEstimate) -> tuple[str, int]:
    return call("diagonal_part", [text(expr.expr)], changed(expr, skip=("expr",))), ATOM


@_text.register
def _(expr: Nystrom) -> tuple[str, int]:
    return call("nystrom", [text(expr.expr), str(expr.rank)], changed(expr, skip=("expr", "rank"))), ATOM


@_text.register
def _(expr: BlockDiagonal) -> tuple[str, int]:
    if isinstance(expr.what, Expr):
        by = {} if expr.by == "parameter" else {"by": expr.by}
        return call("block_diagonal", [text(expr.what)], by), ATOM
    if all(len(block.params) == 1 and not block.joint for block in expr.what):
        entries = ", ".join(f"{block.params[0]!r}: {text(block.expr)}" for block in expr.what)
        unique = len({block.params for block in expr.what}) == len(expr.what)
        if unique:
            return f"block_diagonal({{{entries}}})", ATOM
    return f"block_diagonal([{', '.join(text_block(block) for block in expr.what)}])", ATOM


def text_block(block: Block) -> str:
    """The text of one block in the syntax of :func:`curvalg.parse`."""
    joint = {"joint": True} if block.joint else {}
    return call("block", [patterns(block.params), text(block.expr)], joint)


@_text.register
def _(expr: Restriction) -> tuple[str, int]:
    return call("restrict", [text(expr.expr), patterns(expr.params)], {}), ATOM


@_text.register
def _(expr: EntryRestriction) -> tuple[str, int]:
    inner = expr.expr
    if isinstance(inner, Restriction) and inner.params == expr.entries.names:
        inner = inner.expr  # as it is written
    return call("restrict", [text(inner), repr(expr.entries)], {}), ATOM


@_text.register
def _(expr: ArrayLeaf) -> tuple[str, int]:
    return f"{type(expr).__name__}<{expr.describe()}>", ATOM


@_text.register
def _(expr: NamedExpr) -> tuple[str, int]:
    options = changed(expr)
    if not expr.label.isidentifier():
        return call("term", [repr(expr.label)], options), ATOM
    return (call(expr.label, [], options) if options else expr.label), ATOM


def patterns(params: tuple[str, ...]) -> str:
    """The text of parameter names or patterns: one string, or a list."""
    return repr(_names(params))


def _names(params: tuple[str, ...]) -> str | list[str]:
    return params[0] if len(params) == 1 else list(params)


def changed(expr: Any, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Options of a dataclass node that differ from their defaults, as text."""
    fields = (
        [f for f in dataclasses.fields(expr) if f.init and f.name not in skip] if dataclasses.is_dataclass(expr) else []
    )
    return {f.name: value for f in fields if (value := getattr(expr, f.name)) != f.default}


def call(name: str, positional: list[str], options: dict[str, Any]) -> str:
    """The text of a call, ``name(a, b, option=value)``."""
    shown = [f"{key}={text(v) if isinstance(v, Expr) else repr(v)}" for key, v in options.items()]
    return f"{name}({', '.join([*positional, *shown])})"
