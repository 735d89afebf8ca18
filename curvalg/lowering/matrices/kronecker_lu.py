"""A matrix that is only good for solves: by factorisations of itself or of its Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvalg.lowering.matrices.bases import kronecker
from curvalg.lowering.matrices.structure import Eigh, Function, Structure
from curvalg.solve import factorize
from curvalg.tensors.memory import wide


class KroneckerLU(Structure):
    """The product F₁ ⊗ F₂ ⊗ … (or one matrix) of square factors, not symmetric, factorised one by one.

    Args:
        factors: float64.
        scale: a number in front.
    """

    def __init__(self, factors: Sequence[Tensor], scale: float = 1.0) -> None:
        size = 1
        for factor in factors:
            size *= factor.shape[0]
        super().__init__(size)
        self.factors, self.scale = list(factors), scale
        self._solves: list[Callable[[Tensor], Tensor]] | None = None

    def multiply(self, x: Tensor) -> Tensor:
        return self.scale * kronecker([f.to(x.dtype) for f in self.factors], x)

    def solve(self, b: Tensor) -> Tensor:
        if self._solves is None:
            self._solves = [factorize(f, positive_definite=None) for f in self.factors]
        result = wide(b).reshape(*[f.shape[0] for f in self.factors], b.shape[1])
        for axis, solve in enumerate(self._solves):
            moved = result.movedim(axis, 0)
            result = solve(moved.flatten(1)).reshape(moved.shape).movedim(0, axis)
        return (result.reshape(b.shape) / self.scale).to(b.dtype)

    def mapped(self, function: Function, name: str) -> None:
        return None

    def trace(self) -> float:
        result = self.scale
        for factor in self.factors:
            result *= float(factor.diagonal().sum())
        return result

    def diagonal(self) -> Tensor:
        result = self.factors[0].new_full((1,), self.scale)
        for factor in self.factors:
            result = torch.outer(result, factor.diagonal()).reshape(-1)
        return result

    def logdet(self) -> float:
        total = self.size * float(torch.tensor(abs(self.scale), device="cpu").double().log())
        for factor in self.factors:
            total += self.size / factor.shape[0] * float(torch.linalg.slogdet(factor).logabsdet)
        return total

    def eigh(self) -> Eigh | None:
        return None
