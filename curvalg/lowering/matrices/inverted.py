"""The inverse of a structured matrix whose eigenvalues are not known."""

from __future__ import annotations

from torch import Tensor

from curvalg.lowering.matrices.structure import Eigh, Function, Structure


class Inverted(Structure):
    """The inverse A⁻¹, by the solves of A."""

    def __init__(self, inverted: Structure) -> None:
        super().__init__(inverted.size)
        self.inverted = inverted

    @property
    def inner(self) -> tuple[Structure, ...]:
        return (self.inverted,)

    def multiply(self, x: Tensor) -> Tensor:
        return self.inverted.solve(x)

    def solve(self, b: Tensor) -> Tensor:
        return self.inverted.multiply(b)

    def mapped(self, function: Function, name: str) -> None:
        return None

    def trace(self) -> float | None:
        diagonal = self.diagonal()
        return None if diagonal is None else float(diagonal.sum())

    def diagonal(self) -> Tensor | None:
        return self.inverted.inverse_diagonal()

    def inverse_diagonal(self) -> Tensor | None:
        return self.inverted.diagonal()

    def logdet(self) -> float | None:
        inner = self.inverted.logdet()
        return None if inner is None else -inner

    def eigh(self) -> Eigh | None:
        return None
