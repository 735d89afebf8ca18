"""Results of estimators: a value with its error or residuals, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from curvalg.errors import ExpressionError
from curvalg.problem import Layout


@dataclass(frozen=True, kw_only=True)
class Result:
    """The base of what every estimator returns.

    Args:
        method: what was done, "exact" where structure gave the answer.
        products: products of the operator with one vector, a block of K counted K times.
        seconds: of all runs together, where one was resumed.
        converged: whether what was asked for was reached.
        partial: whether the run was interrupted; the values are those of the last complete step.
    """

    method: str
    products: int
    seconds: float
    converged: bool
    partial: bool

    @property
    def account(self) -> dict[str, Any]:
        """The entries of the base class, for another result of the same run."""
        return {entry.name: getattr(self, entry.name) for entry in fields(Result)}

    def plot(self, ax: Any = None) -> Any:
        """Draw the result on matplotlib axes (new ones by default), and return them."""
        raise NotImplementedError(f"{type(self).__name__} has no plot")


@dataclass(frozen=True, kw_only=True)
class Estimate(Result):
    """An estimated number, or one number for each parameter, with its error.

    Args:
        value: the estimate, a float or a tensor of shape (D,).
        error: one standard error, of the same shape; 0.0 where the value is exact.
    """

    value: float | Tensor
    error: float | Tensor


def exactly(value: float | Tensor, products: int, begin: float) -> Estimate:
    """An estimate without error, of a computation that began at the given time."""
    error, seconds = torch.zeros_like(value) if isinstance(value, Tensor) else 0.0, time.perf_counter() - begin
    return Estimate(
        method="exact", products=products, seconds=seconds, converged=True, partial=False, value=value, error=error
    )


@dataclass(frozen=True, kw_only=True)
class Eigenpairs(Result):
    """Eigenvalues with eigenvectors; ``w, V = pairs`` takes them apart.

    Args:
        eigenvalues: ascending, float64, shape (k,).
        eigenvectors: orthonormal columns (n, k), in the precision and on the device of the operator.
        residuals: ‖A v − λ v‖ of each pair, recomputed from products, (k,); each bounds the distance to the nearest
            eigenvalue. Of an interrupted run they are estimates.
        layout: of the model's parameters, where the operator acts on them.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor = field(repr=False)
    residuals: Tensor
    layout: Layout | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.eigenvalues, self.eigenvectors))

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def unflatten(self, i: int) -> dict[str, Tensor]:
        """Eigenvector i by parameter names, in the shapes of the model's parameters.

        Raises:
            ExpressionError: the operator does not act on parameters.
        """
        if self.layout is None:
            raise ExpressionError(
                "expected eigenvectors of an operator on parameters, but this one acts on plain vectors; use eigenvectors[:, i]"
            )
        return self.layout.unflatten(self.eigenvectors[:, i])

    def plot(self, ax: Any = None) -> Any:
        """Draw eigenvalues by falling magnitude, each with its residual as a bar; negative ones are hollow."""
        ax = axes(ax)
        order = self.eigenvalues.abs().argsort(descending=True)
        values, bars = self.eigenvalues[order].cpu(), self.residuals[order].cpu()
        ranks = torch.arange(1, len(values) + 1, device="cpu")
        for chosen, face, label in ((values >= 0, None, "λ ≥ 0"), (values < 0, "none", "λ < 0")):
            if bool(chosen.any()):
                style = {"fmt": "o", "capsize": 3, "label": label, "color": "C0", "markerfacecolor": face or "C0"}
                ax.errorbar(ranks[chosen].numpy(), values[chosen].abs().numpy(), bars[chosen].numpy(), **style)
        if bool((values != 0).all()):
            ax.set_yscale("log")
        ax.set_xlabel("rank")
        ax.set_ylabel("|λ|")
        ax.legend()
        return ax


def axes(ax: Any) -> Any:
    """The given matplotlib axes, or new ones."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with pip install 'curvalg[plot]'") from error
    return plt.subplots()[1]
