"""The identity and zero: of any size, or (zero) of given spaces."""

from __future__ import annotations

from dataclasses import dataclass

from curvalg.errors import OptionError
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.node import Expr, Space
from curvalg.expr.nodes.composite import as_patterns, square


@dataclass(frozen=True, repr=False)
class IdentityExpr(Expr):
    """The identity, of any size. Use the instance ``curvalg.Identity``."""

    domain = None
    codomain = None

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(positive_definite=True)

    def __call__(self, *_: object) -> Expr:
        raise OptionError("the identity is an expression, of any size: write Identity, as in ggn + 1e-3 * Identity")


@dataclass(frozen=True, repr=False)
class ZeroExpr(Expr):
    """Zero, of any size (``curvalg.Zero``), or of given spaces when it is what a cancelled sum left behind.

    Args:
        codomain: the space of its results; None only together with ``domain``, for any size.
        domain: the space it acts on.
        codomain_params: names or patterns of the parameters that the codomain is restricted to; None for all.
        domain_params: the same of the domain.

    Raises:
        ExpressionError: one space without the other, or parameters of a side that has none.

    >>> print(ZeroExpr("outputs", "parameters", domain_params=("head.*",)))
    restrict(zero('outputs', 'parameters'), 'head.*')
    """

    codomain: Space | None = None  # type: ignore[misc]
    domain: Space | None = None  # type: ignore[misc]
    codomain_params: tuple[str, ...] | None = None
    domain_params: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        spaces = (self.codomain, self.domain)
        if spaces != (None, None) and not all(space in ("parameters", "outputs") for space in spaces):
            raise OptionError(f"zero has two spaces of 'parameters' and 'outputs', or none; got {spaces}")
        for name, space in (("codomain", self.codomain), ("domain", self.domain)):
            params = getattr(self, f"{name}_params")
            if params is None:
                continue
            if space != "parameters":
                raise OptionError(f"{name}_params chooses parameters, but the {name} of this zero is {space}")
            object.__setattr__(self, f"{name}_params", as_patterns(params))

    def facts(self, loss: LossFacts | None = None) -> Facts:
        if self.domain != self.codomain:
            return Facts(symmetric=False)
        known = True if square(self) else None  # two patterns may choose the same parameters
        return Facts(symmetric=known, psd=known, positive_definite=False)

    def __call__(self, *_: object) -> Expr:
        raise OptionError("zero is an expression, of any size: write Zero, without parentheses")


Identity = IdentityExpr()
Zero = ZeroExpr()


def zero_between(left: Expr, right: Expr) -> ZeroExpr:
    """The zero with the codomain of ``left`` and the domain of ``right``."""
    return ZeroExpr(left.codomain, right.domain, left.codomain_params, right.domain_params)
