"""The trace tr f(A) by stochastic Lanczos quadrature, which logdet and effective_dimension share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from torch import Tensor

from curvalg.errors import FactsError
from curvalg.estimate.proofs import require_symmetric
from curvalg.estimate.request import Request
from curvalg.estimate.result import Estimate
from curvalg.estimate.sampling.slq import StochasticLanczos
from curvalg.estimate.target import Target
from curvalg.runs.run import run
from curvalg.solve.quadrature import GaussRules

LONGER = 5
"""Steps of each probe for each probe: 500 products are 10 probes of 50 steps."""
DOUBLINGS = 7
"""How often the probes are doubled for a tolerance."""


def spectral_sum(
    given: Target,
    function: Callable[[Tensor], Tensor],
    request: Request,
    steps: int | None,
    name: str,
    begin: float,
) -> Estimate:
    """The trace tr f(A) = n E qᵀ f(A) q over unit vectors q.

    Args:
        given: a symmetric operator.
        function: of Ritz values; raises where they are outside its domain.
        request: how many products, and to which error.
        steps: of each probe, or None for √(5 products).
        name: for messages and checkpoints.
        begin: when the clock was started.
    """
    given = given.in_units()
    file = given.checkpoint(request.checkpoint)
    size, (probes, steps) = given.size, _split(request.products, steps, given.size)

    def measured(rule: GaussRules) -> tuple[float, float]:
        value, error, bias = rule.mean(function)
        return size * value, size * (error + bias)

    def enough(rule: GaussRules) -> bool:
        value, error = measured(rule)
        return error <= (request.tol or 0.0) * abs(value)

    algorithm = StochasticLanczos(
        target=given,
        probes=probes,
        steps=steps,
        seed=int(request.seed),
        name=name,
        locked=given.rows(None, name),
        before=require_symmetric(given, request.seed),
        enough=None if request.tol is None else enough,
        most=probes * steps * 2**DOUBLINGS,
    )
    outcome = run(algorithm, checkpoint=file, progress=request.progress, expected=given.expected)
    rule = algorithm.result(outcome)
    value, error = measured(rule)
    result = Estimate(
        method=algorithm.method,
        products=outcome.state.products,
        seconds=max(outcome.seconds, time.perf_counter() - begin),
        converged=not outcome.partial and (request.tol is None or enough(rule)),
        partial=outcome.partial,
        value=value,
        error=error,
    )
    if not result.converged and not result.partial:
        bias = size * rule.mean(function)[2]
        cure = "raise steps= (of each probe)" if bias > error / 2 else "raise products= or tol="
        message = (
            f"{name} is {value:.6g} ± {error:.2g} after {result.products} products, which is not yet within "
            f"tol={request.tol}; {cure}"
        )
        request.fail(message, result, depth=5)
    return result


def _split(products: int, steps: int | None, size: int) -> tuple[int, int]:
    """The pair (probes, steps) for a matrix of so many rows; two probes at least, where there are two products."""
    longest = max(products // 2, 1) if steps is None else products
    steps = round(math.sqrt(LONGER * products)) if steps is None else steps
    steps = max(1, min(steps, size, longest))
    return max(1, products // steps), steps


def refuse_negative(values: Tensor, what: str, name: str, *, strictly: bool, eps: float) -> Tensor:
    """The Ritz values, with rounding errors below zero set to zero.

    Raises:
        FactsError: one that is negative, or zero where that is not allowed.
    """
    least, noise = float(values.min()), 100 * eps * float(values.abs().max())
    if least < -noise or (strictly and least <= 0):
        raise FactsError(
            f"{what} needs a positive {'' if strictly else 'semi'}definite operator, but {name} has the Ritz value "
            f"{least:.3g}; add damping, + c * Identity with c > {abs(min(least, 0.0)):.3g}, or take a term that is positive "
            "semidefinite, such as ggn"
        )
    return values.clamp_min(0.0)
