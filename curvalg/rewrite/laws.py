"""The law book: every exact equality that curvalg uses, each with a numeric witness."""

from __future__ import annotations

from collections.abc import Sequence

from curvalg.expr import (
    BlockDiagonal,
    Identity,
    Inverse,
    Product,
    Restriction,
    Sum,
    Transpose,
    add,
    block_diagonal,
    inverse,
    multiply,
    restrict,
    transpose,
)
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr
from curvalg.expr.terms import GGN, Fisher, Jacobian, LossHessian, MonteCarloFisher, MonteCarloGGN
from curvalg.rewrite.engine import Apply, Law
from curvalg.rewrite.witness import Matrix

A, B, S = Matrix("A"), Matrix("B"), Matrix("S", symmetric=True)


def _transpose_symmetric(expr: Expr, loss: LossFacts | None) -> Expr | None:
    if isinstance(expr, Transpose) and expr.expr.facts(loss).symmetric:
        return expr.expr
    return None


def _transpose(kind: type[Expr]) -> Apply:
    def apply(expr: Expr, loss: LossFacts | None) -> Expr | None:
        if isinstance(expr, Transpose) and isinstance(expr.expr, kind):
            return expr.expr.transposed(transpose)
        return None

    return apply


def _inverse_inverse(expr: Expr, loss: LossFacts | None) -> Expr | None:
    return expr.expr.expr if isinstance(expr, Inverse) and isinstance(expr.expr, Inverse) else None


def _inverse_scaled(expr: Expr, loss: LossFacts | None) -> Expr | None:
    if not isinstance(expr, Inverse):
        return None
    if expr.expr == Identity:
        return Identity
    if not isinstance(total := expr.expr, Sum):
        return None
    if not total.coefficients:
        return add([(total.space or Identity, 1 if total.space else 0), (Identity, 1 / total.shift)])
    if len(total.coefficients) == 1 and not total.shift:
        ((part, coefficient),) = total.coefficients.items()
        return add([(inverse(part, **expr.options), 1 / coefficient)])
    return None


_GAUSS_NEWTON = (transpose(Jacobian()), LossHessian(), Jacobian())


def _gauss_newton(expr: Expr, loss: LossFacts | None) -> Expr | None:
    if not isinstance(expr, Product):
        return None
    factors = expr.factors
    for i in range(len(factors) - 2):
        if factors[i : i + 3] == _GAUSS_NEWTON:
            return multiply([*factors[:i], GGN(), *factors[i + 3 :]])
    return None


def _fisher_is_ggn(expr: Expr, loss: LossFacts | None) -> Expr | None:
    if loss is None or not loss.fisher_is_ggn:
        return None
    if isinstance(expr, Fisher):
        return GGN()
    return MonteCarloGGN(expr.samples, expr.seed) if isinstance(expr, MonteCarloFisher) else None


def _restrict_sum(expr: Expr, loss: LossFacts | None) -> Expr | None:
    if isinstance(expr, Restriction) and isinstance(total := expr.expr, Sum):
        parts = [(restrict(part, expr.params), c) for part, c in total.coefficients.items()]
        space = [] if total.space is None else [(restrict(total.space, expr.params), 1)]
        return add([*parts, *space, (Identity, total.shift)])
    return None


def _restrict_product(expr: Expr, loss: LossFacts | None) -> Expr | None:
    # Only where the inner spaces are outputs: P J D then J P' with D on outputs. Between parameters a sub-matrix of a
    # product is not the product of sub-matrices.
    if not (isinstance(expr, Restriction) and isinstance(expr.expr, Product)):
        return None
    first, *middle, last = expr.expr.factors
    if any("parameters" in (factor.domain, factor.codomain) for factor in middle):
        return None
    if first.domain != "outputs" or last.codomain != "outputs":
        return None
    ends = [restrict(f, expr.params) if "parameters" in (f.domain, f.codomain) else f for f in (first, last)]
    return multiply([ends[0], *middle, ends[1]])


_NATURAL = LossFacts("a natural likelihood", convex=True, likelihood=True, fisher_is_ggn=True, classes=True)


def _gauss_newton_witnesses() -> Sequence[Expr]:
    product = multiply(_GAUSS_NEWTON)
    return [product, 2 * A @ product @ S]


LAWS: tuple[Law, ...] = (
    Law("transpose of a symmetric matrix", "S.T = S", _transpose_symmetric, lambda: [S.T, GGN().T]),
    Law("transpose of a sum", "(a*A + b*B + c*I).T = a*A.T + b*B.T + c*I", _transpose(Sum), lambda: [(2 * A - B + 3 * Identity).T]),
    Law("transpose of a product", "(A @ B).T = B.T @ A.T", _transpose(Product), lambda: [(A @ B).T, (A @ S @ B).T]),
    Law("transpose of an inverse", "inverse(A).T = inverse(A.T)", _transpose(Inverse), lambda: [inverse(A).T]),
    Law("transpose of a sub-matrix", "restrict(A, p).T = restrict(A.T, p)", _transpose(Restriction), lambda: [restrict(A, "a").T]),
    Law("transpose of blocks", "block_diagonal(A).T = block_diagonal(A.T)", _transpose(BlockDiagonal), lambda: [block_diagonal(A).T]),
    Law("inverse of an inverse", "inverse(inverse(A)) = A", _inverse_inverse, lambda: [inverse(inverse(A))]),
    Law("inverse of a multiple", "inverse(c*A) = inverse(A) / c", _inverse_scaled, lambda: [inverse(-3 * A), inverse(4 * Identity) @ A]),
    Law("Gauss-Newton", "jacobian.T @ loss_hessian @ jacobian = ggn", _gauss_newton, _gauss_newton_witnesses),
    Law("Fisher of a natural likelihood", "fisher = ggn, fisher_mc = ggn_mc", _fisher_is_ggn, lambda: [Fisher(), MonteCarloFisher(2, 1)], _NATURAL),
    Law("sub-matrix of a sum", "restrict(a*A + c*I, p) = a*restrict(A, p) + c*I", _restrict_sum, lambda: [restrict(2 * A - B / 3 + 5 * Identity, "a")]),
    Law(
        "sub-matrix through outputs",
        "restrict(jacobian.T @ X @ jacobian, p) = restrict(jacobian.T, p) @ X @ restrict(jacobian, p)",
        _restrict_product,
        lambda: [restrict(Jacobian().T @ Jacobian(), "a"), restrict(LossHessian() @ Jacobian(), "a")],
    ),
)  # fmt: skip
"""All laws, in the order in which they are tried."""
