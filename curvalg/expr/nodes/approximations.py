"""Simpler matrices made from one: its diagonal, exact or estimated, and its Nyström approximation of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from curvalg.errors import OptionError
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.node import Expr
from curvalg.expr.nodes.composite import require_endomorphism, require_semidefinite
from curvalg.expr.nodes.constants import Identity, ZeroExpr
from curvalg.expr.nodes.sums import Sum, add
from curvalg.expr.nodes.transposes import SelfTransposed


@dataclass(frozen=True, repr=False, eq=False)
class DiagonalPart(SelfTransposed):
    """The diagonal of a matrix on parameters, as a diagonal matrix; made by :func:`diagonal_part`."""

    expr: Expr

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return diagonal_part(children[0])

    def find_facts(self, loss: LossFacts | None) -> Facts:
        inner = self.expr.facts(loss)  # an indefinite matrix may have a positive diagonal
        return Facts(symmetric=True, psd=inner.psd or None, positive_definite=inner.positive_definite or None)


@dataclass(frozen=True, repr=False, eq=False)
class DiagonalEstimate(SelfTransposed):
    """An unbiased estimate of the diagonal of a matrix on parameters; made by :func:`diagonal_part` with probes."""

    expr: Expr
    probes: int
    seed: int = 0

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return diagonal_part(children[0], probes=self.probes, seed=self.seed)

    def find_facts(self, loss: LossFacts | None) -> Facts:
        return Facts(symmetric=True)  # the estimate of a positive number may be negative


def diagonal_part(expr: Expr, *, probes: int = 0, seed: int = 0) -> Expr:
    """The diagonal part diag(A₁₁, A₂₂, …) of a matrix on parameters.

    With probes it is estimated: the mean of v ∘ A v over random signs v, unbiased, with variance Σ_{j≠i} A_ij² / probes of
    entry i for a symmetric A. What the structure of A gives exactly is taken exactly, a shift c I too. Bekas, Kokiopoulou
    and Saad, Applied Numerical Mathematics 2007.

    Args:
        expr: an operator from parameters to the same parameters.
        probes: 0 for the exact diagonal, which without structure takes a product for every parameter; otherwise the
            number of products with random vectors.
        seed: of the probes.

    Raises:
        ExpressionError: not an operator on parameters; probes or seed below zero.

    >>> from curvalg import diagonal_part, registry
    >>> print(diagonal_part(registry.build("hessian")))
    diagonal_part(hessian)
    >>> print(diagonal_part(registry.build("hessian"), probes=50))
    diagonal_part(hessian, probes=50)
    """
    require_endomorphism(expr, "diagonal_part")
    _require_integers("diagonal_part", probes=(probes, 0), seed=(seed, 0))
    if expr.domain is None or isinstance(expr, ZeroExpr):  # a multiple of the identity
        return expr
    return DiagonalEstimate(expr, int(probes), int(seed)) if probes else DiagonalPart(expr)


def _require_integers(function: str, **options: tuple[object, int]) -> None:
    """Raises:
    ExpressionError: an option that is not an integer, or below its least value.
    """
    for name, (value, least) in options.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise OptionError(f"{function}: {name} must be an integer ≥ {least}, got {value!r}")


@dataclass(frozen=True, repr=False, eq=False)
class Nystrom(SelfTransposed):
    """A Nyström approximation; made by :func:`nystrom`."""

    expr: Expr
    rank: int
    seed: int = 0

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return nystrom(children[0], self.rank, seed=self.seed)

    def find_facts(self, loss: LossFacts | None) -> Facts:
        return Facts(psd=True)


def nystrom(expr: Expr, rank: int, *, seed: int = 0) -> Expr:
    """The Nyström approximation Â = (A Ω)(Ωᵀ A Ω)⁺(A Ω)ᵀ of low rank, with a random orthonormal Ω (D × rank).

    A shift is kept exact: the approximation of A + c I is Â + c I, with the c of the simplified expression. Frangella,
    Tropp and Udell 2023, arXiv 2110.02820.

    Args:
        expr: an operator on parameters, symmetric and positive semi-definite apart from its shift.
        rank: number of columns of Ω; as many products with A are needed.
        seed: of Ω.

    Raises:
        ExpressionError: not an operator on parameters; known not to be symmetric or not to be positive semi-definite;
            a rank or seed out of range.

    >>> from curvalg import Identity, nystrom, registry
    >>> print(nystrom(registry.build("ggn") + 0.1 * Identity, 20))
    nystrom(ggn, 20) + 0.1*identity
    """
    require_endomorphism(expr, "nystrom")
    _require_integers("nystrom", rank=(rank, 1), seed=(seed, 0))
    # The shift of the normal form: one hidden in (A + c I).T must count too, or simplifying would change the matrix.
    normal = expr.simplify()
    shift = normal.shift if isinstance(normal, Sum) else 0
    rest = add([(normal, 1), (Identity, -shift)])
    if rest.domain is None or isinstance(rest, ZeroExpr):  # nothing but a shift
        return expr
    require_semidefinite(rest, "nystrom")
    part = add([(expr, 1), (Identity, -shift)])
    return add([(Nystrom(part, int(rank), int(seed)), 1), (Identity, shift)])
