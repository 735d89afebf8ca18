"""A Kronecker product damped by a diagonal on one side, which is diagonal after a change of variables."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.lowering.matrices.bases import KroneckerBasis, kronecker
from curvalg.lowering.matrices.structure import Eigh, Function, Structure, singular
from curvalg.solve import eigenpairs
from curvalg.tensors.memory import wide


class Congruent(Structure):
    """The matrix B ⊗ A + I ⊗ D, D a positive diagonal, as M (b aᵀ + 1) Mᵀ with M = Q_B ⊗ D^{1/2} Q.

    Q diag(a) Qᵀ is D^{-1/2} A D^{-1/2}, and Q_B diag(b) Q_Bᵀ is B. M is not orthogonal, so these are no eigenvalues.

    Args:
        output: B, float64.
        inputs: A, float64.
        damping: the diagonal of D, positive, float64.
        what: for messages.
    """

    def __init__(self, output: Tensor, inputs: Tensor, damping: Tensor, what: str) -> None:
        super().__init__(len(output) * len(inputs))
        self.output, self.inputs, self.damping, self.what = output, inputs, damping, what
        self._eigen: tuple[Tensor, KroneckerBasis] | None = None
        self._zeros = 0

    @property
    def _weights(self) -> Tensor:
        """The damping D for every row (n, 1)."""
        return self.damping.repeat(len(self.output))[:, None]

    def _decomposed(self) -> tuple[Tensor, KroneckerBasis]:
        """The values b aᵀ + 1, flat, and the basis Q_B ⊗ Q."""
        if self._eigen is None:
            root = self.damping.sqrt()
            b, left = eigenpairs(self.output)
            a, right = eigenpairs(self.inputs / torch.outer(root, root))
            values = torch.outer(b, a).reshape(-1) + 1
            self._zeros = int((values.abs() <= torch.finfo(values.dtype).eps * values.abs().max()).sum())
            self._eigen = values, KroneckerBasis([left, right])
        return self._eigen

    def multiply(self, x: Tensor) -> Tensor:
        product = kronecker([self.output, self.inputs], wide(x))
        return (product + self._weights * wide(x)).to(x.dtype)

    def solve(self, b: Tensor) -> Tensor:
        values, basis = self._decomposed()
        if self._zeros:
            raise singular(self.what, self._zeros)
        root = self._weights.sqrt()
        return (basis.synthesise(basis.analyse(wide(b) / root) / values[:, None]) / root).to(b.dtype)

    def mapped(self, function: Function, name: str) -> None:
        return None

    def trace(self) -> float:
        return float(self.output.trace() * self.inputs.trace() + len(self.output) * self.damping.sum())

    def diagonal(self) -> Tensor:
        return torch.outer(self.output.diagonal(), self.inputs.diagonal()).reshape(-1) + self._weights[:, 0]

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of M⁻ᵀ (b aᵀ + 1)⁻¹ M⁻¹, with M⁻ᵀ = Q_B ⊗ D^{-1/2} Q.

        Raises:
            FactsError: singular to working precision.
        """
        values, basis = self._decomposed()
        if self._zeros:
            raise singular(self.what, self._zeros)
        return basis.squares(values.reciprocal()) / self._weights[:, 0]

    def logdet(self) -> float:
        return float(self._decomposed()[0].abs().log().sum() + len(self.output) * self.damping.log().sum())

    def eigh(self) -> Eigh | None:
        return None
