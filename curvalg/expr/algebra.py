"""The algebra: canonical sums, products, transposes, inverses, block-diagonals and restrictions of expressions."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal

from curvalg.errors import ExpressionError
from curvalg.expr.facts import Facts, LossFacts, all_of
from curvalg.expr.node import Expr, Space


def as_coefficient(value: Any) -> Fraction:
    """A real scalar as the exact fraction of its shortest decimal form, so that ``0.1`` means one tenth.

    Raises:
        ExpressionError: not a finite real number.

    >>> as_coefficient(0.1) + as_coefficient(0.2)
    Fraction(3, 10)
    """
    if isinstance(value, numbers.Rational) and not isinstance(value, bool):
        return Fraction(int(value.numerator), int(value.denominator))  # NumPy's integers would overflow
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item") and not isinstance(value, numbers.Real):
        value = value.item()  # a 0-d tensor or array
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ExpressionError(f"expected a real number to scale an operator with, got {value!r}")
    if not math.isfinite(value):
        raise ExpressionError(f"expected a finite number to scale an operator with, got {value!r}")
    return Fraction(str(value))


@dataclass(frozen=True, repr=False)
class IdentityExpr(Expr):
    """The identity, of any size. Use the instance ``curvalg.Identity``."""

    domain = None
    codomain = None

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(positive_definite=True)


@dataclass(frozen=True, repr=False)
class ZeroExpr(Expr):
    """Zero, of any size, or of the given spaces when it is what a cancelled sum left behind."""

    codomain: Space | None = None  # type: ignore[misc]
    domain: Space | None = None  # type: ignore[misc]

    def facts(self, loss: LossFacts | None = None) -> Facts:
        square = self.domain == self.codomain
        return Facts(symmetric=square, psd=square, positive_definite=False)


Identity = IdentityExpr()
Zero = ZeroExpr()


class Sum(Expr):
    """A canonical linear combination Σ cᵢ Aᵢ + shift · I.

    Made by ``+``, ``-`` and scaling. Flattened, unordered, equal terms merged, the identity held apart; coefficients
    are exact fractions. Two sums are equal when their coefficients are, in whatever order they were written.

    Args:
        coefficients: term -> coefficient, none zero.
        shift: coefficient of the identity.
        space: the zero that stands for the size where every term that had one cancelled.
    """

    def __init__(self, coefficients: Mapping[Expr, Fraction], shift: Fraction, space: Expr | None = None) -> None:
        object.__setattr__(self, "coefficients", MappingProxyType(dict(coefficients)))
        object.__setattr__(self, "shift", shift)
        object.__setattr__(self, "space", space)
        object.__setattr__(self, "_hash", hash((Sum, frozenset(self.coefficients.items()), shift, space)))

    coefficients: Mapping[Expr, Fraction]
    shift: Fraction
    space: Expr | None
    _hash: int

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"expressions are immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"expressions are immutable; cannot delete {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        # The hash of strings differs between processes: rebuild it rather than pickle it.
        return Sum, (dict(self.coefficients), self.shift, self.space)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sum):
            return NotImplemented
        return (self.coefficients, self.shift, self.space) == (other.coefficients, other.shift, other.space)

    def __hash__(self) -> int:
        return self._hash

    @property
    def _typed(self) -> Expr:
        return next((e for e in self.coefficients if e.domain is not None), self.space or Identity)

    @property
    def domain(self) -> Space | None:  # type: ignore[override]
        return self._typed.domain

    @property
    def codomain(self) -> Space | None:  # type: ignore[override]
        return self._typed.codomain

    @property
    def domain_params(self) -> tuple[str, ...] | None:
        return self._typed.domain_params

    @property
    def codomain_params(self) -> tuple[str, ...] | None:
        return self._typed.codomain_params

    @property
    def children(self) -> tuple[Expr, ...]:
        return tuple(self.coefficients)

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        pairs: list[tuple[Expr, Any]] = list(zip(children, self.coefficients.values(), strict=True))
        return add([*pairs, (Identity, self.shift), *([(self.space, 1)] if self.space else [])])

    def facts(self, loss: LossFacts | None = None) -> Facts:
        parts = [(child.facts(loss), c > 0) for child, c in self.coefficients.items()]
        unsymmetric = sum(facts.symmetric is False for facts, _ in parts)
        unknown = any(facts.symmetric is None for facts, _ in parts)
        # One asymmetric part cannot be made up for by symmetric ones; two may cancel.
        symmetric = None if unknown or unsymmetric > 1 else not unsymmetric
        psd = all(facts.psd and positive for facts, positive in parts) and self.shift >= 0
        definite = psd and (self.shift > 0 or any(facts.positive_definite for facts, _ in parts))
        if not parts:
            return Facts(symmetric=True, psd=self.shift >= 0, positive_definite=self.shift > 0)
        if psd:
            return Facts(psd=True, positive_definite=definite or None)
        # One definite matrix with a negative sign and nothing to make up for it: certainly not positive.
        negative = self.shift <= 0 and all(facts.psd and not positive for facts, positive in parts)
        negative = negative and (self.shift < 0 or any(facts.positive_definite for facts, _ in parts))
        return Facts(
            symmetric=symmetric, psd=False if negative else None, positive_definite=False if negative else None
        )


def add(pairs: Iterable[tuple[Expr, Any]]) -> Expr:
    """The canonical form of Σ cᵢ Aᵢ.

    Raises:
        ExpressionError: the terms do not act between the same spaces.
    """
    coefficients: dict[Expr, Fraction] = {}
    shift = Fraction(0)
    typed: Expr | None = None
    for expr, scale in pairs:
        scale = as_coefficient(scale)
        parts: Mapping[Expr, Fraction] = {expr: Fraction(1)}
        if isinstance(expr, Sum):
            parts, shift = expr.coefficients, shift + scale * expr.shift
        elif isinstance(expr, IdentityExpr):
            parts, shift = {}, shift + scale
        elif _is_zero(expr):
            parts = {}
        if expr.domain is not None:
            typed = _agree(typed, expr)
        for part, coefficient in parts.items():
            coefficients[part] = coefficients.get(part, Fraction(0)) + scale * coefficient
    coefficients = {expr: c for expr, c in coefficients.items() if c}
    if shift and typed is not None and _space(typed, "domain") != _space(typed, "codomain"):
        raise ExpressionError(f"the identity is square; it cannot be added to {typed}, which is {_shape(typed)}")
    zero = None if typed is None else _zero_like(typed)
    if not coefficients:
        if not shift:
            return zero or Zero
        return Identity if shift == 1 and zero is None else Sum({}, shift, zero)
    # What is left may have no size of its own, as the inverse of a multiple of the identity.
    space = zero if all(expr.domain is None for expr in coefficients) else None
    if not shift and space is None and list(coefficients.values()) == [1]:
        return next(iter(coefficients))
    return Sum(coefficients, shift, space)


def _space(expr: Expr, side: Literal["domain", "codomain"]) -> tuple[Space | None, tuple[str, ...] | None]:
    if side == "domain":
        return expr.domain, expr.domain_params
    return expr.codomain, expr.codomain_params


def _shape(expr: Expr) -> str:
    def name(side: Literal["domain", "codomain"]) -> str:
        space, params = _space(expr, side)
        return f"{space or 'any'}{list(params) if params else ''}"

    return f"{name('domain')} -> {name('codomain')}"


def _agree(typed: Expr | None, expr: Expr) -> Expr:
    if typed is None:
        return expr
    if any(_space(typed, side) != _space(expr, side) for side in ("domain", "codomain")):
        raise ExpressionError(
            f"cannot add operators between different spaces: {typed} is {_shape(typed)}, {expr} is {_shape(expr)}"
        )
    return typed


def _is_zero(expr: Expr) -> bool:
    return isinstance(expr, ZeroExpr) or (isinstance(expr, Restriction) and isinstance(expr.expr, ZeroExpr))


def _zero_like(expr: Expr) -> Expr:
    zero: Expr = ZeroExpr(codomain=expr.codomain, domain=expr.domain)
    params = expr.domain_params or expr.codomain_params
    return Restriction(zero, params) if params else zero


@dataclass(frozen=True, repr=False)
class Product(Expr):
    """A product of two or more factors, applied from right to left; made by ``@``."""

    factors: tuple[Expr, ...]

    @property
    def _first(self) -> Expr:
        # A factor without a size of its own, as inverse(2 * Identity), takes its neighbour's.
        return next((f for f in self.factors if f.domain is not None), self.factors[0])

    @property
    def _last(self) -> Expr:
        return next((f for f in reversed(self.factors) if f.domain is not None), self.factors[-1])

    @property
    def domain(self) -> Space | None:  # type: ignore[override]
        return self._last.domain

    @property
    def codomain(self) -> Space | None:  # type: ignore[override]
        return self._first.codomain

    @property
    def domain_params(self) -> tuple[str, ...] | None:
        return self._last.domain_params

    @property
    def codomain_params(self) -> tuple[str, ...] | None:
        return self._first.codomain_params

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.factors

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return multiply(children)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        if self.domain != self.codomain:
            return Facts(symmetric=False)
        if self.domain_params != self.codomain_params:
            return Facts()  # two patterns may choose the same parameters
        mirrored = tuple(_mirror(f, loss) for f in reversed(self.factors))
        if mirrored != self.factors:
            return Facts()
        middle = self.factors[len(self.factors) // 2].facts(loss) if len(self.factors) % 2 else Facts(psd=True)
        return Facts(symmetric=True, psd=True if middle.psd else None)


def _mirror(expr: Expr, loss: LossFacts | None) -> Expr:
    return expr if expr.facts(loss).symmetric else expr.T


def multiply(factors: Iterable[Expr]) -> Expr:
    """The canonical form of A₁ @ A₂ @ …: flattened, numbers in front, identities dropped, zeros absorbing.

    Raises:
        ExpressionError: the spaces of neighbours do not match.
    """
    factors = list(factors)
    scale = Fraction(1)
    flat: list[Expr] = []
    for expr in factors:
        if isinstance(expr, Sum) and len(expr.coefficients) + bool(expr.shift) == 1 and expr.space is None:
            (part, coefficient), *_ = [*expr.coefficients.items(), (Identity, expr.shift)]
            scale *= coefficient
            expr = part
        if not isinstance(expr, IdentityExpr):
            flat.extend(expr.factors if isinstance(expr, Product) else [expr])
    sized = [expr for expr in flat if expr.domain is not None]
    for left, right in itertools.pairwise(sized):
        if _space(left, "domain") != _space(right, "codomain"):
            raise ExpressionError(
                f"cannot multiply ({left}) @ ({right}): the left one is {_shape(left)}, the right one {_shape(right)}"
            )
    if any(_is_zero(expr) for expr in flat):
        return _zero_product(sized)
    if not flat:
        return add([(Identity, scale)])
    product = flat[0] if len(flat) == 1 else Product(tuple(flat))
    return add([(product, scale)])


def _zero_product(sized: Sequence[Expr]) -> Expr:
    if not sized:
        return Zero
    zero: Expr = ZeroExpr(codomain=sized[0].codomain, domain=sized[-1].domain)
    params = sized[0].codomain_params or sized[-1].domain_params
    return Restriction(zero, params) if params else zero


def power(base: Expr, exponent: Any) -> Expr:
    """``base ** exponent``: repeated products; the inverse for negative exponents.

    Raises:
        ExpressionError: the exponent is not an integer, or the base is not square.
    """
    if isinstance(exponent, bool) or not isinstance(exponent, numbers.Integral):
        raise ExpressionError(f"expected an integer power of an operator, got {exponent!r}")
    if _space(base, "domain") != _space(base, "codomain"):
        raise ExpressionError(f"a power needs a square operator; {base} is {_shape(base)}")
    exponent = int(exponent)
    if exponent == 0:
        return add([(base, 0), (Identity, 1)])
    if exponent < 0:
        base = inverse(base)
    return multiply([base] * abs(exponent))


@dataclass(frozen=True, repr=False)
class Transpose(Expr):
    """The transpose of an expression; made by ``.T``."""

    expr: Expr

    @property
    def domain(self) -> Space | None:  # type: ignore[override]
        return self.expr.codomain

    @property
    def codomain(self) -> Space | None:  # type: ignore[override]
        return self.expr.domain

    @property
    def domain_params(self) -> tuple[str, ...] | None:
        return self.expr.codomain_params

    @property
    def codomain_params(self) -> tuple[str, ...] | None:
        return self.expr.domain_params

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.expr,)

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return transpose(children[0])

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return self.expr.facts(loss)


def transpose(expr: Expr) -> Expr:
    """The transpose; a double transpose is the expression itself."""
    if isinstance(expr, Transpose):
        return expr.expr
    if isinstance(expr, IdentityExpr):
        return expr
    if isinstance(expr, ZeroExpr):
        return ZeroExpr(codomain=expr.domain, domain=expr.codomain)
    if isinstance(expr, Restriction) and _is_zero(expr):
        return Restriction(transpose(expr.expr), expr.params)
    return Transpose(expr)


Solver = Literal["auto", "diagonal", "dense", "cg", "minres"]


@dataclass(frozen=True, repr=False)
class Inverse(Expr):
    """The inverse of a square expression; made by :func:`inverse`."""

    expr: Expr
    solver: Solver = "auto"
    rtol: float | None = None
    atol: float = 0.0
    maxiter: int | None = None
    preconditioner: Expr | None = None
    on_fail: Literal["raise", "warn"] = "raise"

    @property
    def domain(self) -> Space | None:  # type: ignore[override]
        return self.expr.codomain

    @property
    def codomain(self) -> Space | None:  # type: ignore[override]
        return self.expr.domain

    @property
    def domain_params(self) -> tuple[str, ...] | None:
        return self.expr.codomain_params

    @property
    def codomain_params(self) -> tuple[str, ...] | None:
        return self.expr.domain_params

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.expr,)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the solve, as :func:`inverse` takes them."""
        names = ("solver", "rtol", "atol", "maxiter", "preconditioner", "on_fail")
        return {name: getattr(self, name) for name in names}

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return inverse(children[0], **self.options)

    def facts(self, loss: LossFacts | None = None) -> Facts:
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
) -> Expr:
    """The inverse of a square expression: exact where structure allows, iterative otherwise.

    Args:
        expr: a square expression.
        solver: "auto" or the name of one strategy.
        rtol: relative residual of an iterative solve; None: 1e-5 in float32, 1e-8 in float64.
        atol: absolute residual of an iterative solve.
        maxiter: the most iterations of an iterative solve; None: chosen from the size.
        preconditioner: an approximation whose inverse is cheap.
        on_fail: "raise" or "warn" when the tolerance is not reached.

    Raises:
        ExpressionError: not square, zero, or an option out of range.

    >>> from curvalg import Identity, inverse, registry
    >>> print(inverse(registry.build("ggn") + 1e-3 * Identity, solver="cg"))
    inverse(ggn + 0.001*identity, solver='cg')
    """
    if not isinstance(expr, Expr):
        raise ExpressionError(f"inverse() takes an expression, got {type(expr).__name__}")
    if _space(expr, "domain") != _space(expr, "codomain"):
        raise ExpressionError(f"only a square operator has an inverse; {expr} is {_shape(expr)}")
    if _is_zero(expr):
        raise ExpressionError("the zero operator has no inverse; add c * Identity first")
    if solver not in (known := ("auto", "diagonal", "dense", "cg", "minres")):
        raise ExpressionError(f"unknown solver {solver!r}; choose one of {', '.join(known)}")
    if on_fail not in ("raise", "warn"):
        raise ExpressionError(f"on_fail is 'raise' or 'warn', got {on_fail!r}")
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        real = isinstance(tolerance, numbers.Real) and not isinstance(tolerance, bool)
        if tolerance is not None and not (real and 0 <= tolerance < math.inf):
            raise ExpressionError(f"{name} must be a finite number ≥ 0, got {tolerance!r}")
    if maxiter is not None and (isinstance(maxiter, bool) or not isinstance(maxiter, int) or maxiter < 1):
        raise ExpressionError(f"maxiter must be a positive integer or None, got {maxiter!r}")
    if preconditioner is not None and not isinstance(preconditioner, Expr):
        raise ExpressionError(
            f"preconditioner must be an expression, got {type(preconditioner).__name__}; operators and callables go to "
            "expr.lower(problem, preconditioner=...)"
        )
    rtol = None if rtol is None else float(rtol)  # a Fraction or a NumPy float would not print as a literal
    return Inverse(expr, solver, rtol, float(atol), maxiter, preconditioner, on_fail)


@dataclass(frozen=True, repr=False)
class Block:
    """One block of a block-diagonal matrix.

    Args:
        params: names or glob patterns of the parameters of this block, in its order.
        expr: the matrix over these parameters.
        joint: the block is laid out as the columns of [W | b] (weight and bias side by side) instead of one
            parameter after the other.
    """

    params: tuple[str, ...]
    expr: Expr
    joint: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", as_patterns(self.params))
        if not isinstance(self.expr, Expr):
            raise ExpressionError(f"a block holds an expression, got {type(self.expr).__name__}")

    def __repr__(self) -> str:
        from curvalg.expr.show import text_block

        return text_block(self)


Partition = Literal["parameter", "module"] | tuple[tuple[str, ...], ...]


@dataclass(frozen=True, repr=False)
class BlockDiagonal(Expr):
    """A block-diagonal matrix; made by :func:`block_diagonal`.

    Either the diagonal blocks of one expression (``what`` an expression, ``by`` the partition), or given blocks
    (``what`` a tuple of :class:`Block`, ``by`` None).
    """

    what: Expr | tuple[Block, ...]
    by: Partition | None = "parameter"

    @property
    def domain_params(self) -> tuple[str, ...] | None:
        return self.what.domain_params if isinstance(self.what, Expr) else None

    @property
    def codomain_params(self) -> tuple[str, ...] | None:
        return self.domain_params

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.what,) if isinstance(self.what, Expr) else tuple(block.expr for block in self.what)

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        if isinstance(self.what, Expr):
            return BlockDiagonal(children[0], self.by)
        blocks = zip(self.what, children, strict=True)
        return BlockDiagonal(tuple(Block(b.params, child, joint=b.joint) for b, child in blocks), None)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        parts = [child.facts(loss) for child in self.children]
        # Principal blocks inherit what holds; what fails for the whole may still hold for each block.
        return Facts(
            symmetric=all_of(f.symmetric for f in parts) or None,
            psd=all_of(f.psd for f in parts) or None,
            positive_definite=all_of(f.positive_definite for f in parts) or None,
        )


def block_diagonal(
    what: Expr | Mapping[str, Expr] | Sequence[Block],
    *,
    by: Literal["parameter", "module"] | Sequence[Sequence[str]] = "parameter",
) -> Expr:
    """The block-diagonal part of an expression, or a matrix put together from blocks.

    Args:
        what: an expression; or a mapping from name patterns to expressions; or a list of :class:`Block`.
        by: for an expression: one block per "parameter", per "module", or per group of names or glob patterns.

    Raises:
        ExpressionError: not an endomorphism of parameter space, or nothing to put together.

    >>> from curvalg import block_diagonal, registry
    >>> print(block_diagonal(registry.build("ggn"), by="module"))
    block_diagonal(ggn, by='module')
    """
    if isinstance(what, Expr):
        _require_endomorphism(what, "block_diagonal")
        if isinstance(by, str):
            if by not in ("parameter", "module"):
                raise ExpressionError(f"by is 'parameter', 'module' or groups of names, got {by!r}")
            return BlockDiagonal(what, by)  # type: ignore[arg-type]
        if not isinstance(by, Iterable) or not (groups := tuple(as_patterns(group) for group in by)):
            raise ExpressionError(f"by is 'parameter', 'module' or groups of names, got {by!r}")
        return BlockDiagonal(what, groups)
    if by != "parameter":
        raise ExpressionError("by= partitions an expression; given blocks name their own parameters")
    if isinstance(what, Mapping):
        blocks = tuple(Block((pattern,), expr) for pattern, expr in what.items())
    else:
        blocks = tuple(what) if isinstance(what, Iterable) else ()
    if not blocks or not all(isinstance(block, Block) for block in blocks):
        raise ExpressionError(
            "block_diagonal() takes an expression, a mapping {pattern: expression} or a list of Block"
        )
    for block in blocks:
        _require_endomorphism(block.expr, "block_diagonal")
    return BlockDiagonal(blocks, None)


def _require_endomorphism(expr: Expr, what: str) -> None:
    if not isinstance(expr, Expr):
        raise ExpressionError(f"{what}() takes an expression, got {type(expr).__name__}")
    if {expr.domain, expr.codomain} - {"parameters", None} or expr.domain_params != expr.codomain_params:
        raise ExpressionError(f"{what}() needs an operator on parameters; {expr} is {_shape(expr)}")


@dataclass(frozen=True, repr=False)
class Restriction(Expr):
    """The sub-matrix over chosen parameters, in their own layout; made by :func:`restrict`."""

    expr: Expr
    params: tuple[str, ...]

    @property
    def domain(self) -> Space | None:  # type: ignore[override]
        return self.expr.domain

    @property
    def codomain(self) -> Space | None:  # type: ignore[override]
        return self.expr.codomain

    @property
    def domain_params(self) -> tuple[str, ...] | None:
        return self.params if self.expr.domain == "parameters" else None

    @property
    def codomain_params(self) -> tuple[str, ...] | None:
        return self.params if self.expr.codomain == "parameters" else None

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.expr,)

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return restrict(children[0], self.params)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        inner = self.expr.facts(loss)
        if self.domain != self.codomain:
            return Facts(symmetric=False)
        return Facts(inner.symmetric or None, inner.psd or None, inner.positive_definite or None)


def restrict(expr: Expr, params: str | Sequence[str]) -> Expr:
    """The sub-matrix of an expression over some parameters (of a jacobian: its columns), in their own layout.

    Args:
        expr: an expression with parameters on at least one side.
        params: names or glob patterns, matched against the problem's parameter names when lowered.

    Raises:
        ExpressionError: the expression has no parameter side, or is restricted to other parameters already.

    >>> from curvalg import registry, restrict
    >>> print(restrict(registry.build("hessian"), "head.*"))
    restrict(hessian, 'head.*')
    """
    patterns = as_patterns(params)
    if not isinstance(expr, Expr):
        raise ExpressionError(f"restrict() takes an expression, got {type(expr).__name__}")
    if isinstance(expr, IdentityExpr) or (isinstance(expr, ZeroExpr) and expr.domain is None):
        return expr
    if "parameters" not in (expr.domain, expr.codomain) and expr.domain is not None:
        raise ExpressionError(f"restrict() chooses parameters, but {expr} is {_shape(expr)}")
    sides = (_space(expr, "domain"), _space(expr, "codomain"))
    inner = [params for space, params in sides if space == "parameters"]
    if all(params == patterns for params in inner):
        return expr
    if restricted := next((params for params in inner if params is not None), None):
        raise ExpressionError(
            f"{expr} is restricted to {list(restricted)} already; restrict the original to {list(patterns)}"
        )
    return Restriction(expr, patterns)


def as_patterns(params: str | Sequence[str]) -> tuple[str, ...]:
    """Names or glob patterns as a tuple without repeats.

    Raises:
        ExpressionError: empty, or not strings.
    """
    given = (params,) if isinstance(params, str) or not isinstance(params, Iterable) else tuple(params)
    patterns = tuple(p for i, p in enumerate(given) if p not in given[:i])
    if not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ExpressionError(f"expected parameter names or glob patterns such as 'head.*', got {params!r}")
    return patterns
