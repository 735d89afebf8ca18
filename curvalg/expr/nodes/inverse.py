"""Inverses and the options of their solves."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from curvalg.errors import ExpressionError, OptionError
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.node import Expr
from curvalg.expr.nodes.composite import shape, square
from curvalg.expr.nodes.constants import ZeroExpr
from curvalg.expr.nodes.transposes import Reversed

Solver = Literal[
    "auto",
    "diagonal",
    "kronecker",
    "eigenbasis",
    "blocks",
    "woodbury",
    "gram",
    "kernel",
    "function",
    "dense",
    "cg",
    "minres",
]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
"""What ``solver=`` takes: "auto", or the name of one solver; "auto" tries all others in this order."""
ALIASES: dict[str, Solver] = {"dual": "gram"}
"""Other names of solvers."""


@dataclass(frozen=True, repr=False, eq=False)
class Inverse(Reversed):
    """The inverse of a square expression; made by :func:`inverse`."""

    expr: Expr
    solver: Solver = "auto"
    rtol: float | None = None
    atol: float = 0.0
    maxiter: int | None = None
    preconditioner: Expr | None = None
    on_fail: Literal["raise", "warn"] = "raise"
    check: bool = True

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.expr,) if self.preconditioner is None else (self.expr, self.preconditioner)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the solve, as :func:`inverse` takes them."""
        names = ("solver", "rtol", "atol", "maxiter", "preconditioner", "on_fail", "check")
        return {name: getattr(self, name) for name in names}

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        inner, *preconditioner = children
        return inverse(inner, **{**self.options, "preconditioner": preconditioner[0] if preconditioner else None})

    def transposed(self, of: Callable[[Expr], Expr]) -> Expr:
        options = self.options
        if self.preconditioner is not None:
            options["preconditioner"] = of(self.preconditioner)
        return inverse(of(self.expr), **options)

    def find_facts(self, loss: LossFacts | None) -> Facts:
        inner = self.expr.facts(loss)
        # A semi-definite matrix that has an inverse is definite, and so is the inverse.
        return Facts(symmetric=inner.symmetric, positive_definite=True if inner.psd else None)


def inverse(
    expr: Expr,
    *,
    solver: Solver = "auto",
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    preconditioner: Expr | None = None,
    on_fail: Literal["raise", "warn"] = "raise",
    check: bool = True,
) -> Expr:
    """The inverse of a square expression: exact where structure allows, iterative otherwise.

    A large exact form (a Gram matrix or a factorisation of 1,024 rows or more) of a positive definite matrix is made only once
    solves at a state have taken as long as it does; until then they are by conjugate gradients, to a tenth of the tolerance.
    Naming the solver makes it at the first one.

    Args:
        expr: a square expression.
        solver: "auto", or the name of one solver: "diagonal", "kronecker", "eigenbasis", "blocks", "woodbury", "gram"
            (or "dual"), "kernel", "function", "dense", "cg" or "minres".
        rtol: relative residual of an iterative solve; None: 1e-5 in float32, 1e-8 in float64.
        atol: absolute residual of an iterative solve.
        maxiter: the most iterations of an iterative solve; None: chosen from the size.
        preconditioner: an approximation P of the matrix, whose inverse is cheap and is taken here.
        on_fail: "raise" or "warn" when the tolerance is not reached.
        check: whether a structured inverse is compared with its matrix before it is believed: on random vectors, by the work of
            some ten products, once at each state. False leaves it out for this inverse, ``Problem(verify=False)`` for all.
            Residuals of iterative solves and of reports are computed in either case.

    Raises:
        ExpressionError: not square, zero, or an option out of range.

    >>> from curvalg import Identity, inverse, registry
    >>> print(inverse(registry.build("ggn") + 1e-3 * Identity, solver="cg"))
    inverse(ggn + 0.001*identity, solver='cg')
    """
    if not isinstance(expr, Expr):
        raise ExpressionError(f"inverse() takes an expression such as registry.build('ggn'), got {type(expr).__name__}")
    if not square(expr):
        raise ExpressionError(f"only a square operator has an inverse; {expr} is {shape(expr)}")
    if isinstance(expr, ZeroExpr):
        raise ExpressionError("the zero operator has no inverse; add c * Identity first")
    solver = ALIASES.get(solver, solver) if isinstance(solver, str) else solver
    if solver not in SOLVERS:
        raise OptionError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    if on_fail not in ("raise", "warn"):
        raise OptionError(f"on_fail is 'raise' or 'warn', got {on_fail!r}")
    if not isinstance(check, bool):
        raise OptionError(f"check is True or False, got {check!r}")
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        real = isinstance(tolerance, numbers.Real) and not isinstance(tolerance, bool)
        if tolerance is not None and not (real and 0 <= tolerance < math.inf):
            raise OptionError(f"{name} must be a finite number ≥ 0, got {tolerance!r}")
    if maxiter is not None and (isinstance(maxiter, bool) or not isinstance(maxiter, int) or maxiter < 1):
        raise OptionError(f"maxiter must be a positive integer or None, got {maxiter!r}")
    if preconditioner is not None and not isinstance(preconditioner, Expr):
        raise OptionError(
            f"preconditioner must be an expression, got {type(preconditioner).__name__}; operators and callables go to "
            "expr.lower(problem, preconditioner=...)"
        )
    rtol = None if rtol is None else float(rtol)  # a Fraction or a NumPy float would not print as a literal
    return Inverse(expr, solver, rtol, float(atol), maxiter, preconditioner, on_fail, check)
