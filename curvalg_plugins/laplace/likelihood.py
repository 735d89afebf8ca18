"""The likelihood of a loss: what turns its curvature and its value into those of − log p(data | θ)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from curvalg import LossError, OptionError, Problem
from curvalg.losses import MSE


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a whole data set.

    For a normal distribution of the residuals, − log p = (2σ²)⁻¹ Σ r² + M log(σ √2π); for any other, − log p = Σ numerators.

    Args:
        unit: what a mean loss is divided by (samples, numbers, or the sum of class weights); 1 of a sum.
        total: the sum of the numerators of the loss.
        residuals: M, how many numbers have a residual; 0 where the loss is no squared error.
    """

    unit: float
    total: float
    residuals: int

    @property
    def normal(self) -> bool:
        """Whether it is a normal distribution around the outputs, whose σ is free."""
        return self.residuals > 0

    def scale(self, sigma: float) -> float:
        """The number β with which the curvature of the loss is that of − log p."""
        return self.unit / (2 * sigma**2) if self.normal else self.unit

    def log(self, sigma: float) -> float:
        """The number log p(data | θ)."""
        if not self.normal:
            return -self.total
        return -self.total / (2 * sigma**2) - self.residuals * math.log(sigma * math.sqrt(2 * math.pi))


def likelihood_of(problem: Problem) -> Likelihood:
    """The likelihood of a problem at its present parameters, by one pass over the data.

    Raises:
        LossError: the loss is not the negative logarithm of a probability.
    """
    value = problem.value()
    loss = problem.loss
    assert loss is not None
    if not loss.facts.likelihood:
        raise LossError(
            f"laplace: expected a loss that is the negative logarithm of a probability, such as CrossEntropyLoss or MSELoss, "
            f"got {loss.name}"
        )
    denominator, numbers = 0.0, 0
    with problem.group.together("laplace"), problem.batches() as batches:
        for batch in batches:
            denominator += float(loss.denominator(batch.target))
            numbers += batch.output.numel()
        every = problem.group.numbers(denominator, numbers)
    denominator, numbers = math.fsum(d for d, _ in every), int(sum(n for _, n in every))
    unit = denominator if loss.reduction == "mean" else 1.0
    return Likelihood(unit, value * unit, numbers if isinstance(loss, MSE) else 0)


def require_sigma(likelihood: Likelihood, sigma: float) -> float:
    """A standard deviation of the noise, 1 for losses that have none.

    Raises:
        OptionError: it is no positive number, or given for a loss without one.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
        raise OptionError(f"sigma is a positive number, got {sigma!r}")
    if sigma != 1 and not likelihood.normal:
        raise OptionError(f"sigma is the noise of regression with MSELoss; leave it out, got {sigma!r}")
    return float(sigma)
