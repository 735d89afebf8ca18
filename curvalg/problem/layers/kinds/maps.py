"""Linear maps at fixed inputs, as functions of their weight: what a weight gives, and the gradient with respect to it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.problem.model.layer_record import GuardedInput, bytes_of


@dataclass(frozen=True)
class WeightForm:
    """How a weight lies as one matrix (out, in) per group.

    Args:
        shape: of the parameter.
        groups: of the convolution.
        transposed: input channels first, (in, out / groups, ...), as in transposed convolutions.
    """

    shape: torch.Size
    groups: int = 1
    transposed: bool = False

    @property
    def width(self) -> int:
        """The inputs of each output: columns of a group's matrix."""
        inner = self.shape[0] // self.groups if self.transposed else self.shape[1]
        return inner * math.prod(self.shape[2:])

    def matrices(self, weights: Tensor) -> Tensor:
        """The weights (P, *shape) as matrices (P, groups, out, in)."""
        if not self.transposed:
            return weights.reshape(weights.shape[0], self.groups, self.shape[0] // self.groups, -1)
        inner, out = self.shape[0] // self.groups, self.shape[1]
        return weights.reshape(-1, self.groups, inner, out, *self.shape[2:]).transpose(2, 3).flatten(3)

    def parameter(self, matrices: Tensor) -> Tensor:
        """The weights (P, *shape) from matrices: the inverse of :meth:`matrices`."""
        if not self.transposed:
            return matrices.reshape(-1, *self.shape)
        inner, out = self.shape[0] // self.groups, self.shape[1]
        parts = matrices.reshape(-1, self.groups, out, inner, *self.shape[2:])
        return parts.transpose(2, 3).reshape(-1, *self.shape)


class LinearMap(ABC):
    """The map W -> W h for fixed h, of a layer with T positions in each of n rows.

    Args:
        form: of the weight.
    """

    def __init__(self, form: WeightForm) -> None:
        self.form = form

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The memory that the map holds."""

    @abstractmethod
    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """The inputs h of some rows, (groups, n, T, in)."""

    @abstractmethod
    def push(self, weights: Tensor) -> Tensor:
        """Products W h for weights (P, *shape), as (groups, n, T, P, out)."""

    @abstractmethod
    def pull(self, mixed: Tensor) -> Tensor:
        """Sums Σₙₜ δₙₜ hₙₜᵀ for δ (groups, n, T, P, out), as (P, *shape)."""


class MatrixMap(LinearMap):
    """A map of a last axis, or of patches that exist as a tensor.

    Args:
        form: of the weight.
        held: h (groups, n, T, in).
    """

    def __init__(self, form: WeightForm, held: GuardedInput) -> None:
        super().__init__(form)
        self._held = held

    @property
    def nbytes(self) -> int:
        return bytes_of(self._held.tensor)

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        return self._held.tensor[:, rows]

    def push(self, weights: Tensor) -> Tensor:
        h = self._held.tensor
        groups, rows, positions, _ = h.shape
        # One column per direction and output: (groups, in, directions · out).
        matrix = self.form.matrices(weights).permute(1, 3, 0, 2).flatten(2)
        return (h.flatten(1, 2) @ matrix).reshape(groups, rows, positions, weights.shape[0], -1)

    def pull(self, mixed: Tensor) -> Tensor:
        groups, _, _, width, out = mixed.shape
        matrices = mixed.reshape(groups, -1, width * out).mT @ self._held.tensor.flatten(1, 2)
        return self.form.parameter(matrices.reshape(groups, width, out, -1).transpose(0, 1))
