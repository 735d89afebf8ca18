"""Curves from the nodes of quadrature rules: axes, widths of the bumps, grids."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 0.05
"""Room beyond the outermost nodes, as a share of the range."""
FLOOR = 1e-5
"""The share of the largest |λ| (without outliers) that is added to every |λ| before the logarithm."""
REACH, FINE = 8.0, 3
"""Widths around peaks that the grid covers, and points for each width there."""
LONGEST = 2**16
"""Points of a grid that nobody asked for."""
NEGLIGIBLE = 1e-14
"""Weights that do not count for the range."""


@dataclass(frozen=True)
class Axis:
    """The axis on which bumps are Gaussian.

    Args:
        to: eigenvalue -> position.
        back: position -> what the grid shows: the eigenvalue, or |λ| + floor.
        kappa: of Papyan's rule for the width.
        least: the least half range, of a rule whose nodes lie so far from zero; 0 for 1.
    """

    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    kappa: float
    least: Callable[[float], float]


def linear(_floor: float) -> Axis:
    """The axis whose positions are eigenvalues."""
    return Axis(lambda x: x, lambda x: x, 3.0, lambda far: 1e-2 * far)


def logarithmic(floor: float) -> Axis:
    """The axis with positions log₁₀(|λ| + floor), so that zero is a unit, and what is far from it of no other shape."""
    return Axis(lambda x: (x.abs() + floor).log10(), lambda x: 10**x, 1.04, lambda far: min(1e-2 * far, 0.1))


SCALES: dict[str, Callable[[float], Axis]] = {"linear": linear, "log": logarithmic}
"""The κ are those of Papyan (2020): bumps have to be wider on a logarithmic axis, where nodes are far apart."""


def floor_of(nodes: Tensor) -> float:
    """The floor that is added to magnitudes before the logarithm; 1 for a matrix of zeros."""
    return FLOOR * (float(nodes.abs().max()) if nodes.numel() else 0.0) or 1.0


def extent(positions: Tensor, weights: Tensor, least: Callable[[float], float]) -> tuple[float, float]:
    """The pair (centre, half range with its margin) of the nodes; of a single point a range for a visible peak."""
    seen = positions[weights > NEGLIGIBLE]
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 0.0)
    centre, half = (low + high) / 2, (high - low) / 2 * (1 + 2 * MARGIN)
    return centre, max(half, least(max(abs(low), abs(high)))) or 1.0


def papyan_width(half: float, steps: int, kappa: float) -> float:
    """The width σ = 2 / ((M − 1) √(8 ln κ)) on [−1, 1], times half the range (Papyan, 2020, section D.2)."""
    return half * 2 / (max(steps - 1, 1) * math.sqrt(8 * math.log(kappa)))


def even_grid(centre: float, half: float, width: float, points: int, peaks: Tensor) -> Tensor:
    """A grid even over the range and the tails of bumps at its ends, finer where the width asks for it and around peaks."""
    reach = half + REACH * width
    points = min(max(points, math.ceil(2 * reach / width * FINE)), max(points, LONGEST))
    even = torch.linspace(centre - reach, centre + reach, points, dtype=torch.float64, device="cpu")
    around = torch.linspace(-REACH, REACH, int(2 * REACH * FINE) + 1, dtype=torch.float64, device="cpu") * width
    points_of_all: Tensor = torch.cat([even, (peaks[:, None] + around).flatten()]).unique()
    return points_of_all


def bumps(grid: Tensor, positions: Tensor, weights: Tensor, width: float) -> Tensor:
    """The sum Σ_j w_j N(x; θ_j, σ²) at the points x of the grid, for each row of nodes.

    Args:
        grid: (g,).
        positions, weights: (p, j).
        width: σ.

    Returns:
        (p, g).
    """
    result = torch.zeros(len(positions), len(grid), dtype=torch.float64, device="cpu")
    for i, (centres, heights) in enumerate(zip(positions, weights, strict=True)):
        kept = heights > 0
        for some, w in zip(centres[kept].split(1024), heights[kept].split(1024), strict=True):
            result[i] += w @ torch.exp(-(((grid - some[:, None]) / width) ** 2) / 2)
    return result / (width * math.sqrt(2 * math.pi))
