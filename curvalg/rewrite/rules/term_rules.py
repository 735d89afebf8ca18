"""Right sides of the laws for named terms."""

from __future__ import annotations

from curvalg.expr import Product, multiply, transpose
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr
from curvalg.expr.terms import GGN, Fisher, Jacobian, LossHessian, MonteCarloFisher, MonteCarloGGN

GAUSS_NEWTON = (transpose(Jacobian()), LossHessian(), Jacobian())


def gauss_newton(expr: Product, loss: LossFacts | None) -> Expr | None:
    factors = expr.factors
    for i in range(len(factors) - 2):
        if factors[i : i + 3] == GAUSS_NEWTON:
            return multiply([*factors[:i], GGN(), *factors[i + 3 :]])
    return None


def fisher_is_ggn(expr: Expr, loss: LossFacts | None) -> Expr | None:
    if loss is None or not loss.fisher_is_ggn:
        return None
    if isinstance(expr, Fisher):
        return GGN()
    return MonteCarloGGN(expr.samples, expr.seed) if isinstance(expr, MonteCarloFisher) else None
