"""Results of estimators: a value with its error or residuals, and what it cost."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from curvalg.errors import ExpressionError
from curvalg.markup import card, picture, table
from curvalg.problem import Layout

MOST = 30
"""Eigenvalues that a notebook shows."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """The base of what every estimator returns. It prints as one line; notebooks show it as a card with its picture.

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

    @property
    def findings(self) -> dict[str, str]:
        """What was found, as text by name, the shortest way to say it."""
        return {}

    @property
    def cost(self) -> str:
        """What was done, how often it was multiplied and how long that took, and what went otherwise than asked."""
        said = [self.method, f"{self.products} product{'s' * (self.products != 1)}", f"{self.seconds:.2g} s"]
        said += [] if self.converged else ["not converged"]
        said += ["interrupted: partial result"] if self.partial else []
        return ", ".join(said)

    def __str__(self) -> str:
        found = ", ".join(f"{name} {text}" for name, text in self.findings.items())
        return f"{type(self).__name__}({found}; {self.cost})"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return card(type(self).__name__, {**self.findings, "by": self.cost}, self._html())

    def _html(self) -> str:
        """What a notebook shows below the findings: the picture, where there is one."""
        return "" if type(self).plot is Result.plot else picture(self.plot)

    def plot(self, ax: Any = None) -> Any:
        """Draw the result on matplotlib axes (new ones by default), and return them."""
        raise NotImplementedError(f"{type(self).__name__} has no plot")


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate(Result):
    """An estimated number, or one number for each parameter, with its error.

    A single one is a number where Python asks for one: ``float(estimate)``, ``f"{estimate:.3f}"``.

    Args:
        value: the estimate, a float or a tensor of shape (D,).
        error: one standard error, of the same shape; 0.0 where the value is exact.
    """

    value: float | Tensor
    error: float | Tensor

    @property
    def findings(self) -> dict[str, str]:
        if isinstance(self.value, Tensor) and self.value.ndim:
            most = float(self.error.max()) if isinstance(self.error, Tensor) and self.error.numel() else 0.0
            return {"value": short(self.value), **({"error": f"≤ {most:.2g}"} if most else {})}
        return {"value": with_error(float(self.value), float(self.error))}

    def __float__(self) -> float:
        if isinstance(self.value, Tensor) and self.value.numel() != 1:
            raise TypeError(
                f"expected a single estimate, got one of shape {tuple(self.value.shape)}; take result.value"
            )
        return float(self.value)

    def __format__(self, spec: str) -> str:
        """The value as a number, with its error where it has one; without a format as ``str`` gives it."""
        if not spec:
            return str(self)
        value, error = float(self), float(self.error)
        return format(value, spec) + (f" ± {format(error, spec)}" if error else "")


def exactly(value: float | Tensor, products: int, begin: float) -> Estimate:
    """An estimate without error, of a computation that began at the given time."""
    error, seconds = torch.zeros_like(value) if isinstance(value, Tensor) else 0.0, time.perf_counter() - begin
    return Estimate(
        method="exact", products=products, seconds=seconds, converged=True, partial=False, value=value, error=error
    )


@dataclass(frozen=True, kw_only=True, repr=False)
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
    eigenvectors: Tensor
    residuals: Tensor
    layout: Layout | None = None

    @property
    def findings(self) -> dict[str, str]:
        if not len(self):
            return {"eigenvalues": "[]"}
        return {"eigenvalues": short(self.eigenvalues), "residuals": f"≤ {float(self.residuals.max()):.1g}"}

    def _html(self) -> str:
        order = self.eigenvalues.abs().argsort(descending=True)[:MOST]
        values, residuals = self.eigenvalues[order].tolist(), self.residuals[order].tolist()
        rows = [[str(i), f"{v:.6g}", f"{r:.1g}"] for i, (v, r) in enumerate(zip(values, residuals, strict=True), 1)]
        more = f"<div>and {len(self) - MOST} smaller ones</div>" if len(self) > MOST else ""
        return table(["rank", "eigenvalue", "residual"], rows, values) + more

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
        whole_numbers(ax)
        if bool((values < 0).any()):
            ax.legend()
        return ax


def short(numbers: Tensor) -> str:
    """Numbers in a line, the middle of many left out."""
    shown = [f"{number:.5g}" for number in numbers.detach().reshape(-1).tolist()]
    if len(shown) > 10:
        shown[3:-3] = ["..."]
    return f"[{', '.join(shown)}]"


def with_error(value: float, error: float) -> str:
    """A number with as many digits as its error leaves.

    >>> with_error(2.17012, 0.0312), with_error(2.17012, 0.0), with_error(1234567.0, 2345.0)
    ('2.170 ± 0.031', '2.17012', '1234567 ± 2345')
    """
    if not error or not math.isfinite(error):
        return f"{value:.6g}" + (f" ± {error}" if error else "")
    digits = max(0, 1 - math.floor(math.log10(error)))
    if digits > 6 or abs(value) >= 1e9:
        return f"{value:.6g} ± {error:.2g}"
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def axes(ax: Any) -> Any:
    """The given matplotlib axes, or new ones."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with pip install 'curvalg[plot]'") from error
    return plt.subplots(layout="constrained")[1]


def whole_numbers(ax: Any) -> None:
    """Let the ticks of the horizontal axis be whole numbers, as of ranks."""
    ax.xaxis.get_major_locator().set_params(integer=True)
