"""An estimate by random vectors, from the request to the result or the error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from curvalg.estimate.request import Request, require_enough
from curvalg.estimate.result import Estimate
from curvalg.estimate.sampling.estimator import Estimator, UnitVectors
from curvalg.estimate.sampling.integrands import Integrand
from curvalg.estimate.sampling.sampler import Sampler
from curvalg.estimate.target import Target
from curvalg.runs.run import run
from curvalg.tensors.memory import wide


def sampled(
    estimator: type[Estimator],
    integrand: Integrand,
    target: Target,
    request: Request,
    quantity: str,
    *,
    price: int = 1,
    finish: Callable[[Estimate], Estimate] = lambda result: result,
) -> Estimate:
    """The mean of an integrand over random vectors.

    Args:
        estimator: the method.
        integrand: what is averaged.
        target: the operator.
        request: for how many products, or to which error.
        quantity: in words.
        price: products that one multiplication counts as.
        finish: makes of an estimate in powers of the operator's unit one in the unit itself.

    Raises:
        ExpressionError: not enough products for the method.
        ConvergenceError: the tolerance was not reached.
        ProblemError: a value that is out of range.
    """
    size, products = target.size, int(request.products)
    if estimator is UnitVectors:
        require_enough(products, estimator.method, price * size, f"one for each of {size} unit vectors")
    elif size > 1:
        least = price * 2 * estimator.multiplications
        require_enough(products, estimator.method, least, "two test vectors, to estimate the error")
    most = max(16 * products, min(2 * price * size, 1000)) if request.maxiter is None else int(request.maxiter)
    tol = None if request.tol is None else float(request.tol)
    room = estimator.columns(products // price, size)
    made = estimator(target.in_units(), integrand, int(request.seed), room)
    sampler = Sampler(made, products, tol, most, price)
    outcome = run(
        sampler,
        checkpoint=made.target.checkpoint(request.checkpoint, quantity=quantity),
        progress=request.progress,
        expected=made.target.expected,
    )
    value, error = sampler.result(outcome.state)
    if not sampler.begun(outcome.state):
        raise KeyboardInterrupt("interrupted before there was anything to estimate from")
    found = Estimate(
        method="exact" if sampler.exact(outcome.state) else estimator.method,
        products=outcome.state.products,
        seconds=outcome.seconds,
        converged=not outcome.partial and sampler.reached(outcome.state),
        partial=outcome.partial,
        value=_plain(value),
        error=_plain(error),
    )
    finished = finish(found)
    value, error = (made.target.back(_tensor(x)) for x in (finished.value, finished.error))
    result = replace(finished, value=_plain(value), error=_plain(error))
    if not result.converged and not result.partial:
        of, off = (integrand.size(target, _tensor(x)) for x in (found.value, found.error))
        relative = float(off / of) if of else math.inf
        message = (
            f"the {quantity} of {target.name} has a standard error of {relative:.2g} of its value after {result.products} "
            f"products, more than tol={tol:g}; raise tol= or maxiter="
        )
        request.fail(message, result, depth=5)
    return result


def _tensor(x: float | Tensor) -> Tensor:
    """A number as a tensor in double precision; a vector stays on its device, in its widest float."""
    return wide(x) if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device="cpu")


def _plain(x: Tensor) -> float | Tensor:
    """A scalar tensor as a float."""
    return float(x) if x.ndim == 0 else x
