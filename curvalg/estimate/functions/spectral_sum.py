"""tr f(A) of positive semidefinite operators by stochastic Lanczos quadrature: what logdet and effective_dimension share."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from curvalg.errors import ConvergenceError, CurvalgWarning, FactsError, OptionError
from curvalg.estimate.request import require_count, require_tolerance
from curvalg.estimate.result import Estimate
from curvalg.estimate.sampling.slq import StochasticLanczos
from curvalg.estimate.target import Target, require_symmetric
from curvalg.runs.run import run
from curvalg.runs.run_file import FileName, require_place
from curvalg.solve.quadrature import GaussRules

OnFail = Literal["raise", "warn"]
LONGER = 5
"""Steps of each probe for each probe: 500 products are 10 probes of 50 steps."""
DOUBLINGS = 7
"""How often the probes are doubled for a tolerance."""


@dataclass(frozen=True)
class Effort:
    """The arguments that these estimators share, checked.

    Args:
        products: with one vector, probes · steps.
        tol: relative error that is asked for, or None.
        steps: of each probe, or None for √(5 products).
        seed, checkpoint, progress: as of :func:`curvalg.estimate.eigsh`.
        on_fail: "raise" or "warn".
    """

    products: int
    tol: float | None
    steps: int | None
    seed: int
    on_fail: OnFail
    checkpoint: FileName | None
    progress: bool

    def __post_init__(self) -> None:
        require_count(self.products, "products")
        if self.steps is not None:
            require_count(self.steps, "steps")
        if self.tol is not None:
            require_tolerance(self.tol)
        if self.on_fail not in ("raise", "warn"):
            raise OptionError(f"expected on_fail to be 'raise' or 'warn', got {self.on_fail!r}")
        require_place(self.checkpoint)

    def split(self, size: int) -> tuple[int, int]:
        """(probes, steps) for a matrix of so many rows; two probes at least, where there are two products."""
        longest = max(self.products // 2, 1) if self.steps is None else self.products
        steps = round(math.sqrt(LONGER * self.products)) if self.steps is None else self.steps
        steps = max(1, min(steps, size, longest))
        return max(1, self.products // steps), steps


def require_definite(given: Target, name: str, *, strictly: bool) -> None:
    """Refuse curvature operators that are not proved positive (semi)definite.

    Raises:
        FactsError: not proved.
    """
    if given.operator is None:
        return
    facts = given.operator.facts
    if strictly and not facts.positive_definite:
        cure = (
            "add damping, + c * Identity with c > 0"
            if facts.psd
            else "take a positive semidefinite term, such as ggn or fisher, and add damping, + c * Identity"
        )
        raise FactsError(f"{name} needs a positive definite operator, but {given.name} is not known to be; {cure}")
    if not strictly and not facts.psd:
        raise FactsError(
            f"{name} needs a positive semidefinite operator, but {given.name} is not known to be; take a term that is, such "
            "as ggn or fisher, or a loss that is convex in the outputs"
        )


def spectral_sum(
    given: Target,
    function: Callable[[Tensor], Tensor],
    effort: Effort,
    name: str,
    begin: float,
) -> Estimate:
    """tr f(A) = n E qᵀ f(A) q over unit vectors q.

    Args:
        given: a symmetric operator.
        function: of Ritz values; raises where they are outside its domain.
        effort: how many products, and to which error.
        name: for messages and checkpoints.
        begin: when the clock was started.
    """
    given = given.in_units()
    file = given.checkpoint(effort.checkpoint)
    size, (probes, steps) = given.size, effort.split(given.size)

    def measured(rule: GaussRules) -> tuple[float, float]:
        value, error, bias = rule.mean(function)
        return size * value, size * (error + bias)

    def enough(rule: GaussRules) -> bool:
        value, error = measured(rule)
        return error <= (effort.tol or 0.0) * abs(value)

    algorithm = StochasticLanczos(
        target=given,
        probes=probes,
        steps=steps,
        seed=int(effort.seed),
        name=name,
        locked=given.rows(None, name),
        before=require_symmetric(given, effort.seed),
        enough=None if effort.tol is None else enough,
        most=probes * steps * 2**DOUBLINGS,
    )
    outcome = run(algorithm, checkpoint=file, progress=effort.progress)
    rule = algorithm.result(outcome)
    value, error = measured(rule)
    result = Estimate(
        method=algorithm.method,
        products=outcome.state.products,
        seconds=max(outcome.seconds, time.perf_counter() - begin),
        converged=not outcome.partial and (effort.tol is None or enough(rule)),
        partial=outcome.partial,
        value=value,
        error=error,
    )
    if not result.converged and not result.partial:
        _fail(result, effort, name, size * rule.mean(function)[2])
    return result


def _fail(result: Estimate, effort: Effort, name: str, bias: float) -> None:
    cure = "raise steps= (of each probe)" if bias > float(result.error) / 2 else "raise products= or tol="
    message = (
        f"{name} is {result.value:.6g} ± {result.error:.2g} after {result.products} products, which is not yet within "
        f"tol={effort.tol}; {cure}"
    )
    if effort.on_fail == "raise":
        raise ConvergenceError(message, result)
    warnings.warn(message, CurvalgWarning, stacklevel=4)


def refuse_negative(values: Tensor, what: str, name: str, *, strictly: bool, eps: float) -> Tensor:
    """Ritz values, rounding errors below zero set to zero.

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
