"""A few singular triplets of a rectangular operator."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvalg.errors import ConvergenceError, ExpressionError
from curvalg.estimate.eigen import OnFail, eigsh
from curvalg.estimate.lanczos import Block
from curvalg.estimate.result import Eigenpairs, Result, axes
from curvalg.estimate.target import Target, target
from curvalg.lowering.vectors import Vector
from curvalg.solve.orthogonal import small


@dataclass(frozen=True, kw_only=True)
class SingularTriplets(Result):
    """Singular values with vectors; ``U, s, V = triplets`` takes them apart, A ≈ U diag(s) Vᵀ.

    Args:
        left: columns (m, k); of a singular value that is zero to rounding, zero.
        values: ascending, as eigenvalues are, float64, shape (k,).
        right: orthonormal columns (n, k).
        residuals: ‖Aᵀ A v − s² v‖ / s_max of each, (k,).
    """

    left: Tensor = field(repr=False)
    values: Tensor
    right: Tensor = field(repr=False)
    residuals: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.left, self.values, self.right))

    def plot(self, ax: Any = None) -> Any:
        """Singular values, falling."""
        ax = axes(ax)
        ax.semilogy(range(1, len(self.values) + 1), self.values.flip(0).numpy(), "o")
        ax.set_xlabel("rank")
        ax.set_ylabel("singular value")
        return ax
