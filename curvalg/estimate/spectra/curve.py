"""A spectral density as a result: the curve, its band, and the questions it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvalg.estimate.result import Estimate, Result, axes, short
from curvalg.estimate.spectra.smooth import SCALES, bumps, even_grid, extent, floor_of, papyan_width
from curvalg.solve.quadrature import GaussRules, standard_error


@dataclass(frozen=True)
class Look:
    """The options of how a density is drawn.

    Args:
        scale: "linear" or "log".
        points: a number of them, or the points of the grid.
        width: σ of the bumps, or None for Papyan's rule.
        steps: M in that rule.
    """

    scale: str
    points: int | Tensor
    width: float | None
    steps: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Density(Result):
    """A density of eigenvalues, with the nodes that it is made of.

    Args:
        scale: "linear" or "log".
        grid: eigenvalues, or |λ| + floor on a log scale, ascending, (g,).
        density: at the grid; per decade on a log scale. Integrated over grid, or log₁₀ of it, it is 1.
        lower, upper: one standard error over the probes below and above, wider for few probes by Student's t; NaN for one.
        negative: the share of negative eigenvalues in ``density``, on a log scale; else None.
        outliers: eigenvalues that were computed one by one, ascending, (k,).
        nodes: Ritz values of each probe, (probes, steps).
        weights: of the nodes; with 1/n for each outlier they sum to 1 in each row.
        width: σ of the bumps on the axis.
        floor: what is added to |λ| on a log scale.
        size: n.
    """

    scale: str
    grid: Tensor
    density: Tensor
    lower: Tensor
    upper: Tensor
    negative: Tensor | None
    outliers: Tensor
    nodes: Tensor
    weights: Tensor
    width: float
    floor: float
    size: int
    rule: GaussRules

    @classmethod
    def of(cls, rule: GaussRules, outliers: Tensor, look: Look, size: int, made: Result) -> Density:
        """The curve of rules on the complement of outliers; ``made`` says how they were made."""
        share = (size - len(outliers)) / size
        nodes, weights = rule.nodes, rule.weights * share
        floor = floor_of(nodes)
        axis = SCALES[look.scale](floor)
        positions, peaks = axis.to(nodes), axis.to(outliers)
        centre, half = extent(positions, weights, axis.least)
        width = papyan_width(half, look.steps, axis.kappa) if look.width is None else float(look.width)
        if isinstance(look.points, Tensor):
            shown = look.points.detach().to("cpu", torch.float64)
            grid = shown.log10() if look.scale == "log" else shown
        else:
            grid = even_grid(centre, half, width, look.points, peaks)
            shown = axis.back(grid)
        heights = torch.full_like(outliers, 1 / size)[None]
        fixed = bumps(grid, peaks[None], heights, width)[0]
        each = bumps(grid, positions, weights, width) + fixed
        error = torch.zeros_like(grid) if made.method == "exact" else standard_error(each)
        negative = None
        if look.scale == "log":
            below = bumps(grid, positions, weights * (nodes < 0), width).mean(0)
            negative = below + bumps(grid, peaks[None], heights * (outliers < 0), width)[0]
        mean = each.mean(0)
        return cls(
            **made.account,
            scale=look.scale,
            grid=shown,
            density=mean,
            lower=(mean - error).clamp_min(0),
            upper=mean + error,
            negative=negative,
            outliers=outliers,
            nodes=nodes,
            weights=weights,
            width=width,
            floor=floor,
            size=size,
            rule=rule,
        )

    @property
    def findings(self) -> dict[str, str]:
        probes, steps = self.nodes.shape
        ends = [float(end) for end in (self.nodes.min(), self.nodes.max(), *self.outliers)]
        rules = f"{probes} x {steps}" if self.method != "exact" else "exact"
        found = {"of": f"{self.size} eigenvalues", "from": f"{min(ends):.4g}", "to": f"{max(ends):.4g}", "nodes": rules}
        return found | ({"outliers": short(self.outliers)} if len(self.outliers) else {})

    def cdf(self, x: float | Tensor) -> float | Tensor:
        """The share of eigenvalues ≤ x, without the smoothing of the curve: of a number or of each of a tensor."""
        points = torch.as_tensor(x, dtype=torch.float64, device="cpu")
        below = (self.nodes[..., None] <= points.flatten()) * self.weights[..., None]
        found = (self.outliers[:, None] <= points.flatten()).double().sum(0) / self.size
        shares = (below.sum(1).mean(0) + found).reshape(points.shape)
        return shares if isinstance(x, Tensor) else float(shares)

    def count(self, a: float, b: float) -> Estimate:
        """The number of eigenvalues in [a, b], best with bounds in gaps of the spectrum.

        Its error is one standard error over the probes plus the difference to rules of fewer steps.
        """

        def inside(values: Tensor) -> Tensor:
            return ((values >= a) & (values <= b)).double()

        share, error, bias = self.rule.mean(inside)
        rest = self.size - len(self.outliers)
        value, exact = rest * share + float(inside(self.outliers).sum()), self.method == "exact"
        return Estimate(
            **self.account,
            value=float(round(value)) if exact else value,
            error=0.0 if exact else rest * (error + bias),
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw the curve on a logarithmic axis with its error band; outliers are marked by triangles."""
        ax = axes(ax)
        grid, low = self.grid.numpy(), 0.1 / (self.size * self.width)
        ax.plot(grid, self.density.clamp_min(low).numpy(), color="C0", label="density")
        if bool(torch.isfinite(self.upper).all()):
            lower, upper = (t.clamp_min(low).numpy() for t in (self.lower, self.upper))
            ax.fill_between(grid, lower, upper, color="C0", alpha=0.3, linewidth=0, label="± standard error")
        if self.negative is not None and bool((self.negative > low).any()):
            ax.plot(grid, self.negative.clamp_min(low).numpy(), color="C1", label="of λ < 0")
        if len(self.outliers):
            shown = self.outliers.abs() + self.floor if self.scale == "log" else self.outliers
            peak = 1 / (self.size * self.width * (2 * torch.pi) ** 0.5)
            ax.plot(shown.numpy(), [peak] * len(shown), "v", color="C3", label="outliers")
        if self.scale == "log":
            ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel({"linear": "λ", "log": f"|λ| + {self.floor:.1e}"}[self.scale])
        ax.set_ylabel({"linear": "density", "log": "density per decade"}[self.scale])
        ax.legend()
        return ax
