"""A matrix held as n × n numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvalg.errors import FactsError
from curvalg.expr.facts import Facts
from curvalg.lowering.matrices.bases import MatrixBasis
from curvalg.lowering.matrices.spectral import Spectral
from curvalg.lowering.matrices.structure import Eigh, Function, Structure
from curvalg.problem.batch import lazy
from curvalg.solve import eigenpairs, factorize
from curvalg.tensors.memory import wide


class DenseMatrix(Structure):
    """A dense matrix; solved by Cholesky where positive definiteness is proved, else by LU.

    Args:
        matrix: (n, n), float64.
        facts: what is known of it.
        what: for messages.
        epsilon: unit of rounding of the entries, relative to the largest.
    """

    def __init__(self, matrix: Tensor, facts: Facts, what: str, epsilon: float = 0.0) -> None:
        super().__init__(matrix.shape[0])
        self.matrix, self.facts, self.what, self.epsilon = matrix, facts, what, epsilon
        self._spectral: Spectral | None = None

    def multiply(self, x: Tensor) -> Tensor:
        return self.matrix.to(x.dtype) @ x

    def solve(self, b: Tensor) -> Tensor:
        return self._factorized(wide(b)).to(b.dtype)

    @lazy
    def _factorized(self) -> Callable[[Tensor], Tensor]:
        return factorize(self.matrix, positive_definite=self.facts.positive_definite, rounding=self.epsilon)

    def spectral(self) -> Spectral | None:
        """The matrix by its eigenvalues, if it is symmetric."""
        if self._spectral is None and self.facts.symmetric:
            values, vectors = eigenpairs(self.matrix)
            self._spectral = Spectral(self.size, values, MatrixBasis(vectors), what=self.what)
        return self._spectral

    def mapped(self, function: Function, name: str) -> Structure | None:
        if name == "inverse":
            _ = self._factorized  # raises where there is none
        spectral = self.spectral()
        return None if spectral is None else spectral.mapped(function, name)

    def trace(self) -> float:
        return float(self.matrix.diagonal().sum())

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().clone()

    def logdet(self) -> float:
        if not self.facts.positive_definite and self.facts.symmetric and self.size:
            values = torch.linalg.eigvalsh(self.matrix).abs()
            noise = max(self.epsilon, self.size * torch.finfo(values.dtype).eps) * float(values.max())
            if zeros := int((values <= noise).sum()):
                raise FactsError(
                    f"logdet needs a matrix without zero eigenvalues, but {self.what} has {zeros} that are zero to working "
                    "precision, whose logarithms would be rounding errors; add damping, c * Identity"
                )
        return float(torch.linalg.slogdet(self.matrix).logabsdet)

    def eigh(self) -> Eigh | None:
        spectral = self.spectral()
        return None if spectral is None else spectral.eigh()
