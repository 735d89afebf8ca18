"""Predictions of a posterior: outputs with their variances, and probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from curvalg import OptionError

Link: TypeAlias = Literal["probit", "mc", "mean"]
LINKS = ("probit", "mc", "mean")


@dataclass(frozen=True)
class Prediction:
    """What a posterior says about the targets of some inputs; a result of :meth:`Posterior.predict`.

    Args:
        mean: of the targets: outputs of regression (N, ...), or probabilities of the classes, of the shape of the outputs.
        variance: of the targets, of the same shape: with the noise in regression, p (1 − p) of probabilities.
        output_variance: variances of the outputs of the network alone, of the same shape.
        inputs: that were asked for, where they are one tensor.
        probabilities: whether ``mean`` are probabilities.
    """

    mean: Tensor
    variance: Tensor
    output_variance: Tensor
    inputs: Tensor | None = field(repr=False)
    probabilities: bool

    @property
    def deviation(self) -> Tensor:
        """The standard deviation of the targets."""
        return self.variance.sqrt()

    def plot(self, ax: Any = None) -> Any:
        """Draw predictions on matplotlib axes (new ones by default), and return them.

        Regression: each output with bands of two standard deviations, of the target (light) and of the network's output
        (dark). Classification: the probability of each class. Against the input where there is one, else by row.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        rows = len(self.mean)
        single = self.inputs is not None and self.inputs.numel() == rows
        x = self.inputs.reshape(-1) if single and self.inputs is not None else torch.arange(rows, device="cpu")
        order = x.argsort()
        shown = x[order].cpu()
        mean, total, own = (t.reshape(rows, -1)[order].cpu() for t in (self.mean, self.variance, self.output_variance))
        for i in range(mean.shape[1]):
            colour, label = f"C{i % 10}", f"class {i}" if self.probabilities else f"output {i}"
            ax.plot(shown, mean[:, i], color=colour, label=label if mean.shape[1] > 1 else None)
            for variance, alpha in () if self.probabilities else ((total, 0.15), (own, 0.3)):
                band = 2 * variance[:, i].sqrt()
                ax.fill_between(shown, mean[:, i] - band, mean[:, i] + band, color=colour, alpha=alpha, linewidth=0)
        ax.set_xlabel("input" if single else "row")
        ax.set_ylabel("probability" if self.probabilities else "prediction ± 2 standard deviations")
        if mean.shape[1] > 1:
            ax.legend(frameon=False)
        return ax


def require_link(link: str) -> None:
    """Raise unless a way from outputs to probabilities is known.

    Raises:
        OptionError: it is not.
    """
    if link not in LINKS:
        raise OptionError(f"link is one of {', '.join(map(repr, LINKS))}, got {link!r}")


def probit(outputs: Tensor, variance: Tensor) -> Tensor:
    """Outputs divided by √(1 + π v / 8): MacKay's approximation of the mean of a sigmoid (Neural Computation 4, 1992)."""
    return outputs / (1 + math.pi / 8 * variance).sqrt()


def drawn(outputs: Tensor, covariance: Tensor, samples: int, seed: int) -> Tensor:
    """Draws (samples, N, C) from normal distributions of outputs (N, C) with covariances (N, C, C)."""
    values, vectors = torch.linalg.eigh(covariance.double())
    roots = vectors * values.clamp_min(0).sqrt()[:, None]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.randn(samples, *outputs.shape, 1, generator=generator, dtype=torch.float64, device="cpu").to(
        outputs.device
    )
    draws: Tensor = outputs + (roots @ noise)[..., 0].to(outputs.dtype)
    return draws
