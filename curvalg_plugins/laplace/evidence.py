"""Where the evidence is largest: precisions and noise at which its derivatives vanish."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from curvalg_plugins.laplace.likelihood import Likelihood
from curvalg_plugins.laplace.spectrum import Spectrum

LARGEST = 1e12
"""Precisions and variances are sought between this and its inverse."""
TOLERANCE = 1e-12
"""Relative, of precisions and variances."""
STEPS = 10_000
"""The most steps of precisions and noise in turn."""


def root(falling: Callable[[float], float]) -> float:
    """The positive number at which a falling function changes its sign, by bisection of the logarithm."""
    low, high = -math.log(LARGEST), math.log(LARGEST)
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if falling(math.exp(middle)) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def best_precision(spectrum: Spectrum, squares: float, scale: float) -> float:
    """The precision δ of the largest evidence, where γ(δ) = δ ‖w‖²: the left side falls with δ, the right one rises.

    Args:
        spectrum: of the curvature of a group of parameters.
        squares: ‖w‖² of the group.
        scale: β.
    """
    return root(lambda prior: spectrum.determined(scale, prior) - prior * squares)


def best_variance(spectra: Sequence[Spectrum], priors: Sequence[float], likelihood: Likelihood) -> float:
    """The variance σ² of the largest evidence, where Σ r² / σ² = M − γ(σ²).

    Args:
        spectra: of the curvature of each group.
        priors: δ of each group.
        likelihood: a normal one.
    """

    def slope(variance: float) -> float:
        scale = likelihood.scale(math.sqrt(variance))
        determined = sum(s.determined(scale, prior) for s, prior in zip(spectra, priors, strict=True))
        return likelihood.total / variance - likelihood.residuals + determined

    return root(slope)


def tuned(
    spectra: Sequence[Spectrum],
    squares: Sequence[float],
    priors: Sequence[float],
    sigma: float,
    likelihood: Likelihood,
    noise: bool,
) -> tuple[list[float], float]:
    """Precisions, and σ if asked for, of the largest evidence; in turn, each the best for the others, until none moves."""
    for _ in range(STEPS):
        before = [*priors, sigma]
        scale = likelihood.scale(sigma)
        priors = [best_precision(s, w, scale) for s, w in zip(spectra, squares, strict=True)]
        if not noise:
            break
        sigma = math.sqrt(best_variance(spectra, priors, likelihood))
        now = [*priors, sigma]
        if all(abs(math.log(a / b)) <= 1e-9 for a, b in zip(before, now, strict=True)):
            break
    return list(priors), sigma
