"""Printing expressions: what a person would write, a tree, and LaTeX.

Names follow the canonical printing rules: :func:`text` gives what :func:`curvalg.parse` reads back.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from functools import singledispatch
from typing import Any

from curvalg.expr import algebra as alg
from curvalg.expr.leaves import ArrayLeaf
from curvalg.expr.node import Expr
from curvalg.expr.term import NamedExpr

# Binding strengths, weakest first, as in Python's own grammar.
SUM, PRODUCT, ATOM = 0, 1, 2


def text(expr: Expr) -> str:
    """The expression in the syntax of the command line and of :func:`curvalg.parse`."""
    return _text(expr)[0]


def _wrapped(expr: Expr, strength: int) -> str:
    shown, own = _text(expr)
    return shown if own >= strength else f"({shown})"


def number(value: Fraction) -> str:
    """A positive fraction as the shortest decimal if it has one, else as p or p/q."""
    if value.denominator == 1:
        return str(value.numerator)
    decimal = repr(float(value)) if _fits_float(value) else ""
    return decimal if decimal and Fraction(decimal) == value else f"{value.numerator}/{value.denominator}"


def _fits_float(value: Fraction) -> bool:
    try:
        return 1e-300 < float(value) < 1e300
    except OverflowError:
        return False


def _scaled(coefficient: Fraction, factor: str) -> str:
    """|coefficient| times a factor, as ``2*A``, ``0.1*A``, ``A / 3`` or ``2*A / 3``."""
    coefficient = abs(coefficient)
    shown = number(coefficient)
    if "/" not in shown:
        return factor if coefficient == 1 else f"{shown}*{factor}"
    numerator, denominator = shown.split("/")
    return f"{factor} / {denominator}" if numerator == "1" else f"{numerator}*{factor} / {denominator}"


def _join(parts: list[tuple[bool, str]]) -> str:
    (negative, first), *rest = parts
    shown = f"-{first}" if negative else first
    return shown + "".join(f" {'-' if minus else '+'} {part}" for minus, part in rest)


@singledispatch
def _text(expr: Expr) -> tuple[str, int]:
    return f"{type(expr).__name__}", ATOM


@_text.register
def _(expr: alg.IdentityExpr) -> tuple[str, int]:
    return "identity", ATOM


@_text.register
def _(expr: alg.ZeroExpr) -> tuple[str, int]:
    spaces = [repr(space) for space in (expr.codomain, expr.domain) if space]
    return (f"zero({', '.join(spaces)})" if spaces else "zero"), ATOM


@_text.register
def _(expr: alg.Sum) -> tuple[str, int]:
    parts: list[tuple[bool, str]] = []
    for e, c in expr.coefficients.items():
        # A number or a sign in front of (A + B) @ C would be read as the sum's own.
        bare = abs(c) == 1 and not (c < 0 and not parts)
        leading_sum = isinstance(e, alg.Product) and isinstance(e.factors[0], alg.Sum)
        shown = _wrapped(e, ATOM if leading_sum and not bare else PRODUCT)
        parts.append((c < 0, _scaled(c, shown)))
    if expr.space is not None:
        parts.append((False, text(expr.space)))
    if expr.shift:
        parts.append((expr.shift < 0, _scaled(expr.shift, "identity")))
    return _join(parts), SUM if len(parts) > 1 or parts[0][0] else PRODUCT


@_text.register
def _(expr: alg.Product) -> tuple[str, int]:
    # A scaled factor would lend its number to the whole product when read back, so it is wrapped like a sum.
    return " @ ".join(_wrapped(f, ATOM) for f in expr.factors), PRODUCT


@_text.register
def _(expr: alg.Transpose) -> tuple[str, int]:
    return f"{_wrapped(expr.expr, ATOM)}.T", ATOM


@_text.register
def _(expr: alg.Inverse) -> tuple[str, int]:
    return call("inverse", [text(expr.expr)], changed(expr, skip=("expr",))), ATOM


@_text.register
def _(expr: alg.BlockDiagonal) -> tuple[str, int]:
    if isinstance(expr.what, Expr):
        by = {} if expr.by == "parameter" else {"by": expr.by}
        return call("block_diagonal", [text(expr.what)], by), ATOM
    if all(len(block.params) == 1 and not block.joint for block in expr.what):
        entries = ", ".join(f"{block.params[0]!r}: {text(block.expr)}" for block in expr.what)
        unique = len({block.params for block in expr.what}) == len(expr.what)
        if unique:
            return f"block_diagonal({{{entries}}})", ATOM
    return f"block_diagonal([{', '.join(text_block(block) for block in expr.what)}])", ATOM


def text_block(block: alg.Block) -> str:
    """One block in the syntax of :func:`curvalg.parse`."""
    joint = {"joint": True} if block.joint else {}
    return call("block", [_patterns(block.params), text(block.expr)], joint)


@_text.register
def _(expr: alg.Restriction) -> tuple[str, int]:
    return call("restrict", [text(expr.expr), _patterns(expr.params)], {}), ATOM


@_text.register
def _(expr: ArrayLeaf) -> tuple[str, int]:
    return f"{type(expr).__name__}<{expr.describe()}>", ATOM


@_text.register
def _(expr: NamedExpr) -> tuple[str, int]:
    options = changed(expr)
    if not expr.label.isidentifier():
        return call("term", [repr(expr.label)], options), ATOM
    return (call(expr.label, [], options) if options else expr.label), ATOM


def _patterns(patterns: tuple[str, ...]) -> str:
    return repr(patterns[0]) if len(patterns) == 1 else repr(list(patterns))


def changed(expr: Any, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Options of a dataclass node that differ from their defaults."""
    fields = (
        [f for f in dataclasses.fields(expr) if f.init and f.name not in skip] if dataclasses.is_dataclass(expr) else []
    )
    return {f.name: value for f in fields if (value := getattr(expr, f.name)) != f.default}


def call(name: str, positional: list[str], options: dict[str, Any]) -> str:
    """``name(a, b, option=value)``."""
    shown = [f"{key}={text(v) if isinstance(v, Expr) else repr(v)}" for key, v in options.items()]
    return f"{name}({', '.join([*positional, *shown])})"


# -- trees -------------------------------------------------------------------------------------------------------------


def tree(expr: Expr) -> str:
    """One node a line, children indented below it."""
    return "\n".join(_tree(expr, "", ""))


def _tree(expr: Expr, first: str, rest: str) -> list[str]:
    head, branches = _node(expr)
    lines = [first + head]
    for i, (label, child) in enumerate(branches):
        last = i == len(branches) - 1
        stem, pad = ("└─ ", "   ") if last else ("├─ ", "│  ")
        if isinstance(child, Expr):
            lines += _tree(child, rest + stem + label, rest + pad)
        else:
            lines.append(rest + stem + label + child)
    return lines


def _node(expr: Expr) -> tuple[str, list[tuple[str, Expr | str]]]:
    if isinstance(expr, alg.Sum):
        branches: list[tuple[str, Expr | str]] = []
        for child, c in expr.coefficients.items():
            branches.append((f"{'-' if c < 0 else ''}{number(abs(c))} * ", child))
        if expr.shift:
            branches.append((f"{'-' if expr.shift < 0 else ''}{number(abs(expr.shift))} * ", "identity"))
        return "sum", branches
    if not expr.children:
        return text(expr), []
    options = "" if isinstance(expr, alg.BlockDiagonal) else _options_text(expr)
    return f"{type(expr).__name__.lower()}{options}", [("", child) for child in expr.children]


def _options_text(expr: Expr) -> str:
    options = changed(expr, skip=("expr", "factors"))
    return f" {', '.join(f'{k}={v}' for k, v in options.items())}" if options else ""


# -- LaTeX -------------------------------------------------------------------------------------------------------------


def latex(expr: Expr) -> str:
    """The expression as LaTeX, without dollar signs."""
    return _latex(expr)


def _latex_wrapped(expr: Expr) -> str:
    shown = _latex(expr)
    return rf"\left({shown}\right)" if isinstance(expr, alg.Sum) else shown


def _latex_number(value: Fraction) -> str:
    shown = number(abs(value))
    if "/" in shown:
        numerator, denominator = shown.split("/")
        return rf"\tfrac{{{numerator}}}{{{denominator}}}\,"
    if "e" in shown:
        mantissa, exponent = shown.split("e")
        times = "" if mantissa in ("1", "1.0") else rf"{mantissa} \cdot "
        return rf"{times}10^{{{int(exponent)}}}\,"
    return "" if shown == "1" else rf"{shown}\,"


@singledispatch
def _latex(expr: Expr) -> str:
    return rf"\mathrm{{{_escape(text(expr))}}}"


def _escape(name: str) -> str:
    return name.replace("\\", r"\backslash ").replace("_", r"\_").replace("#", r"\#").replace("%", r"\%")


@_latex.register
def _(expr: NamedExpr) -> str:
    options = ", ".join(f"{k}={v}" for k, v in changed(expr).items())
    symbol = expr.symbol or rf"\mathrm{{{_escape(expr.label)}}}"
    return rf"{symbol}_{{\mathrm{{{_escape(options)}}}}}" if options else symbol


@_latex.register
def _(expr: alg.IdentityExpr) -> str:
    return "I"


@_latex.register
def _(expr: alg.ZeroExpr) -> str:
    return "0"


@_latex.register
def _(expr: alg.Sum) -> str:
    parts = [(c < 0, _latex_number(c) + _latex(e)) for e, c in expr.coefficients.items()]
    if expr.shift:
        parts.append((expr.shift < 0, _latex_number(expr.shift) + "I"))
    return _join(parts)


@_latex.register
def _(expr: alg.Product) -> str:
    return r"\,".join(_latex_wrapped(f) for f in expr.factors)


def _latex_base(expr: Expr) -> str:
    atomic = isinstance(expr, (NamedExpr, alg.BlockDiagonal, alg.IdentityExpr, ArrayLeaf))
    return _latex(expr) if atomic else rf"\left({_latex(expr)}\right)"


@_latex.register
def _(expr: alg.Transpose) -> str:
    return rf"{_latex_base(expr.expr)}^\top"


@_latex.register
def _(expr: alg.Inverse) -> str:
    return rf"{_latex_base(expr.expr)}^{{-1}}"


@_latex.register
def _(expr: alg.BlockDiagonal) -> str:
    inner = ", ".join(_latex(child) for child in expr.children)
    return rf"\operatorname{{blockdiag}}\left({inner}\right)"


@_latex.register
def _(expr: alg.Restriction) -> str:
    names = _escape(", ".join(expr.params))
    return rf"{_latex_base(expr.expr)}\big|_{{\mathrm{{{names}}}}}"


@_latex.register
def _(expr: ArrayLeaf) -> str:
    inner = expr.describe().replace(" x ", r" \times ")
    return rf"\mathrm{{{type(expr).__name__}}}_{{{_escape(inner)}}}"
