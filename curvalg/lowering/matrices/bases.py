"""Orthonormal bases in which a matrix is diagonal; vectors are columns (n, K), coordinates (r, K) with r ≤ n."""

from __future__ import annotations

import math
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
    """The basis of the columns of a matrix Q (n, r), whose precision may be higher than that of vectors."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def analyse(self, x: Tensor) -> Tensor:
        return (self.matrix.T @ x.to(self.matrix.dtype)).to(x.dtype)

    def synthesise(self, y: Tensor) -> Tensor:
        return (self.matrix @ y.to(self.matrix.dtype)).to(y.dtype)

    def squares(self, weights: Tensor) -> Tensor:
        return self.matrix.square() @ weights.to(self.matrix.dtype)

    def columns(self, positions: Tensor) -> Tensor:
        return self.matrix[:, positions]


class KroneckerBasis(Basis):
    """The basis Q₁ ⊗ Q₂ ⊗ … of orthogonal factors, row-major; of stacks (G, n, n), one such basis for each group of rows.

    Args:
        factors: of the basis.
        order: row numbers (n,) in the order of the products, for vectors and coordinates; None: as they lie.
    """

    def __init__(self, factors: Sequence[Tensor], order: Tensor | None = None) -> None:
        self.factors = list(factors)
        self.order = order
        self.sizes = [*factors[0].shape[:-2], *(f.shape[-1] for f in factors)]

    def analyse(self, x: Tensor) -> Tensor:
        return ordered([f.mT for f in self.factors], x, self.order)

    def synthesise(self, y: Tensor) -> Tensor:
        return ordered(self.factors, y, self.order)

    def squares(self, weights: Tensor) -> Tensor:
        squared = [f.square() for f in self.factors]
        return ordered(squared, weights.to(squared[0].dtype)[:, None], self.order)[:, 0]

    def columns(self, positions: Tensor) -> Tensor:
        if self.order is not None or self.factors[0].ndim == 3:
            return self.synthesise(UnitBasis(math.prod(self.sizes), self.factors[0]).columns(positions))
        result = self.factors[0].new_ones(1, len(positions))
        for factor, index in zip(self.factors, torch.unravel_index(positions, self.sizes), strict=True):
            result = (result[:, None] * factor[:, index][None]).flatten(0, 1)
        return result


def ordered(factors: Sequence[Tensor], x: Tensor, order: Tensor | None) -> Tensor:
    """Products as of :func:`kronecker` where x[order] lies in the order of the products; None: x does."""
    return kronecker(factors, x) if order is None else placed(kronecker(factors, x[order]), order)


def kronecker(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """Products (F₁ ⊗ F₂ ⊗ …) X for columns (n, K), row-major: a factor at a time; of stacks, group by group."""
    stacked = factors[0].ndim - 2
    result = x.reshape(*factors[0].shape[:stacked], *[f.shape[-1] for f in factors], x.shape[1])
    for axis, factor in enumerate(factors, stacked):
        if stacked:
            moved = result.movedim(axis, 1)
            result = (factor @ moved.flatten(2)).unflatten(2, moved.shape[2:]).movedim(1, axis)
        else:
            result = torch.tensordot(factor, result, dims=([1], [axis])).movedim(0, axis)
    return result.reshape(-1, x.shape[1])


def placed(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows in the order of the products, put where they lie."""
    if order is None:
        return rows
    result = torch.empty_like(rows)
    result[order] = rows
    return result
