"""Orthonormal bases in which a matrix is diagonal; vectors are columns (n, K), coordinates (r, K) with r ≤ n."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from curvalg.problem.kept.reads import Reads


class Basis(ABC):
    """An orthonormal basis: r vectors in n dimensions, Q (n, r)."""

    def reads(self) -> Reads | str:
        """What it reads that others may drop, or why its kernels are not the same each time."""
        return Reads((self,))

    @abstractmethod
    def analyse(self, x: Tensor) -> Tensor:
        """The coordinates Qᵀ X of vectors."""

    @abstractmethod
    def synthesise(self, y: Tensor) -> Tensor:
        """The vectors Q Y with given coordinates."""

    @abstractmethod
    def squares(self, weights: Tensor) -> Tensor:
        """The diagonal of Q diag(weights) Qᵀ, shape (n,)."""

    @abstractmethod
    def columns(self, positions: Tensor) -> Tensor:
        """Columns of Q at positions (k,), shape (n, k)."""


class UnitBasis(Basis):
    """The basis of unit vectors.

    Args:
        size: n.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self.size, self.like = size, like

    def analyse(self, x: Tensor) -> Tensor:
        return x

    def synthesise(self, y: Tensor) -> Tensor:
        return y

    def squares(self, weights: Tensor) -> Tensor:
        return weights

    def columns(self, positions: Tensor) -> Tensor:
        result = self.like.new_zeros(self.size, len(positions))
        result[positions, torch.arange(len(positions), device=positions.device)] = 1
        return result


class MatrixBasis(Basis):
    """The basis of the columns of a matrix Q (n, r)."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def analyse(self, x: Tensor) -> Tensor:
        return self.matrix.T @ x

    def synthesise(self, y: Tensor) -> Tensor:
        return self.matrix @ y

    def squares(self, weights: Tensor) -> Tensor:
        return self.matrix.square() @ weights.to(self.matrix.dtype)

    def columns(self, positions: Tensor) -> Tensor:
        return self.matrix[:, positions]


class KroneckerBasis(Basis):
    """The basis Q₁ ⊗ Q₂ ⊗ … of orthogonal factors, row-major."""

    def __init__(self, factors: Sequence[Tensor]) -> None:
        self.factors = list(factors)
        self.sizes = [f.shape[0] for f in self.factors]

    def analyse(self, x: Tensor) -> Tensor:
        return kronecker([f.T for f in self.factors], x)

    def synthesise(self, y: Tensor) -> Tensor:
        return kronecker(self.factors, y)

    def squares(self, weights: Tensor) -> Tensor:
        return kronecker([f.square() for f in self.factors], weights.to(self.factors[0].dtype)[:, None])[:, 0]

    def columns(self, positions: Tensor) -> Tensor:
        result = self.factors[0].new_ones(1, len(positions))
        for factor, index in zip(self.factors, torch.unravel_index(positions, self.sizes), strict=True):
            result = (result[:, None] * factor[:, index][None]).flatten(0, 1)
        return result


def kronecker(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """Products (F₁ ⊗ F₂ ⊗ …) X for columns (n, K), row-major: a factor at a time."""
    result = x.reshape(*[f.shape[1] for f in factors], x.shape[1])
    for axis, factor in enumerate(factors):
        result = torch.tensordot(factor, result, dims=([1], [axis])).movedim(0, axis)
    return result.reshape(-1, x.shape[1])
