"""Expressions printed as LaTeX."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from functools import singledispatch

from curvalg.expr.node import Expr
from curvalg.expr.nodes.approximations import DiagonalEstimate, DiagonalPart, Nystrom
from curvalg.expr.nodes.arrays import ArrayLeaf
from curvalg.expr.nodes.block_diagonal import BlockDiagonal
from curvalg.expr.nodes.composite import settled
from curvalg.expr.nodes.constants import IdentityExpr, ZeroExpr
from curvalg.expr.nodes.inverse import Inverse
from curvalg.expr.nodes.products import Product
from curvalg.expr.nodes.restrictions import EntryRestriction, Restriction
from curvalg.expr.nodes.roots import SquareRoot
from curvalg.expr.nodes.sums import Sum
from curvalg.expr.nodes.transposes import Transpose
from curvalg.expr.show.text import changed, join, number, text
from curvalg.expr.term import NamedExpr

SMALL = Fraction(1, 100)
"""Decimals below are written with a power of ten: 10^{-3}, but 0.05."""


def latex(expr: Expr) -> str:
    """The expression as LaTeX, without dollar signs."""
    return settled(expr, "latex", _latex) if expr.children else _latex(expr)


def _latex_wrapped(expr: Expr) -> str:
    shown = latex(expr)
    return rf"\left({shown}\right)" if isinstance(expr, Sum) else shown


def _latex_number(value: Fraction) -> str:
    shown = number(abs(value))
    if "/" in shown:
        numerator, denominator = shown.split("/")
        return rf"\tfrac{{{numerator}}}{{{denominator}}}\,"
    if abs(value) < SMALL or "e" in shown:
        mantissa, exponent = f"{Decimal(shown):e}".split("e")
        times = "" if mantissa == "1" else rf"{mantissa} \cdot "
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
def _(expr: IdentityExpr) -> str:
    return "I"


@_latex.register
def _(expr: ZeroExpr) -> str:
    return "0"


@_latex.register
def _(expr: Sum) -> str:
    parts = [(c < 0, _latex_number(c) + latex(e)) for e, c in expr.coefficients.items()]
    if expr.shift:
        parts.append((expr.shift < 0, _latex_number(expr.shift) + "I"))
    return join(parts)


@_latex.register
def _(expr: Product) -> str:
    return r"\,".join(_latex_wrapped(f) for f in expr.factors)


def _latex_base(expr: Expr) -> str:
    atomic = isinstance(expr, (NamedExpr, BlockDiagonal, DiagonalEstimate, DiagonalPart, IdentityExpr, ArrayLeaf))
    return latex(expr) if atomic else rf"\left({latex(expr)}\right)"


@_latex.register
def _(expr: Transpose) -> str:
    return rf"{_latex_base(expr.expr)}^\top"


@_latex.register
def _(expr: Inverse) -> str:
    if isinstance(expr.expr, SquareRoot):
        return rf"{_latex_base(expr.expr.expr)}^{{-1/2}}"
    return rf"{_latex_base(expr.expr)}^{{-1}}"


@_latex.register
def _(expr: SquareRoot) -> str:
    return rf"{_latex_base(expr.expr)}^{{1/2}}"


@_latex.register
def _(expr: DiagonalPart) -> str:
    return rf"\operatorname{{diag}}\left({latex(expr.expr)}\right)"


@_latex.register
def _(expr: DiagonalEstimate) -> str:
    seed = f",\\, seed={expr.seed}" if expr.seed else ""
    return rf"\operatorname{{diag}}_{{\mathrm{{probes={expr.probes}{seed}}}}}\left({latex(expr.expr)}\right)"


@_latex.register
def _(expr: Nystrom) -> str:
    seed = f",\\, seed={expr.seed}" if expr.seed else ""
    return rf"{_latex_base(expr.expr)}_{{\mathrm{{rank={expr.rank}{seed}}}}}"


@_latex.register
def _(expr: BlockDiagonal) -> str:
    inner = ", ".join(latex(child) for child in expr.children)
    return rf"\operatorname{{blockdiag}}\left({inner}\right)"


@_latex.register
def _(expr: Restriction) -> str:
    names = _escape(", ".join(expr.params))
    return rf"{_latex_base(expr.expr)}\big|_{{\mathrm{{{names}}}}}"


@_latex.register
def _(expr: EntryRestriction) -> str:
    inner = expr.expr.expr if isinstance(expr.expr, Restriction) else expr.expr
    names = _escape(str(expr.entries)[len("Entries<") : -1].split(";")[0])
    return rf"{_latex_base(inner)}\big|_{{\mathrm{{{names}}}}}"


@_latex.register
def _(expr: ArrayLeaf) -> str:
    inner = expr.describe().replace(" x ", r" \times ")
    return rf"\mathrm{{{type(expr).__name__}}}_{{{_escape(inner)}}}"
