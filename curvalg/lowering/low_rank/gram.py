"""The form by the Gram matrix: functions of V Vᵀ + c I through the small VᵀV."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from curvalg.lowering.low_rank.weighted_factor import WeightedFactor
from curvalg.lowering.matrices import Basis, Eigh, Spectral, Structure, singular
from curvalg.lowering.matrices.structure import Function
from curvalg.problem.kept.reads import Reads
from curvalg.solve import eigenpairs, factorize
from curvalg.tensors.memory import wide, widest

SINGLE = 1e4
"""The largest ‖K‖ / c for which a float32 factorisation with refinement is enough; above, float64."""


class GramBasis(Basis):
    """The basis Q = W P κ^(−1/2) for eigenpairs K P = P κ of the Gram matrix with κ > 0."""

    def __init__(self, columns: WeightedFactor, vectors: Tensor, values: Tensor) -> None:
        self._columns, self.vectors, self.roots = columns, vectors, values.sqrt()

    def reads(self) -> Reads | str:
        return self._columns.reads()

    def analyse(self, x: Tensor) -> Tensor:
        inner = self.vectors.T @ self._columns.analyse(x).to(self.vectors.dtype)
        return (inner / self.roots[:, None]).to(x.dtype)

    def synthesise(self, y: Tensor) -> Tensor:
        inner = self.vectors @ (y.to(self.vectors.dtype) / self.roots[:, None])
        return self._columns.synthesise(inner.to(y.dtype))

    def squares(self, weights: Tensor) -> Tensor:
        total: Tensor | None = None
        for at in range(0, len(self.roots), 64):
            positions = torch.arange(at, min(at + 64, len(self.roots)), device=self.roots.device)
            part = self.columns(positions).square() @ weights[positions].to(self._columns.problem.dtype)
            total = part if total is None else total.add_(part)
        return torch.zeros(self._columns.problem.size, device=self.roots.device) if total is None else total

    def columns(self, positions: Tensor) -> Tensor:
        inner = self.vectors[:, positions] / self.roots[positions]
        return self._columns.synthesise(inner.to(self._columns.problem.dtype))


class Gram(Structure):
    """The matrix W Wᵀ + c I with W (D × M), M < D.

    (W Wᵀ + c I)⁻¹ = c⁻¹ (I − W (WᵀW + c I)⁻¹ Wᵀ); the non-zero eigenvalues are those of WᵀW. The Gram matrix is kept on the
    problem, so that another damping costs one factorisation.

    Args:
        columns: W.
        shift: c ≥ 0.
        what: for messages.
    """

    def __init__(self, columns: WeightedFactor, shift: float, what: str) -> None:
        super().__init__(columns.problem.size)
        self.columns, self.shift, self.what = columns, shift, what
        self._solve: Callable[[Tensor], Tensor] | None = None
        self._spectrum: Tensor | None = None
        self._spectral: Spectral | None = None

    def reads(self) -> Reads | str:
        return self.columns.reads()

    def multiply(self, x: Tensor) -> Tensor:
        return self.columns.synthesise(self.columns.analyse(x)).add_(x, alpha=self.shift)

    def _factorized(self) -> Callable[[Tensor], Tensor]:
        if self._solve is None:
            if self.shift <= 0:
                raise singular(self.what, self.size - self.columns.factor.size)
            gram = self.columns.gram()
            condition = float(gram.norm()) / self.shift
            damped = gram.to(widest(gram.device) if condition > SINGLE else gram.dtype, copy=True)
            damped.diagonal().add_(self.shift)
            self._solve = factorize(damped, positive_definite=True)
            self.precision = damped.dtype
        return self._solve

    def solve_inner(self, y: Tensor) -> Tensor:
        """Solutions of (WᵀW + c I) X = Y for Y (M, P), in the precision of the factorisation."""
        inner = self._factorized()
        return inner(y.to(self.precision))

    def solve(self, b: Tensor) -> Tensor:
        y = self.solve_inner(self.columns.analyse(b))
        return (b - self.columns.synthesise(y.to(b.dtype))) / self.shift

    def _values(self) -> Tensor:
        """Eigenvalues of the Gram matrix above its rounding noise, ascending."""
        if self._spectrum is None:
            gram = self.columns.gram()
            values = torch.linalg.eigvalsh(wide(gram))
            self._spectrum = values[values > _noise(gram, float(values[-1]))]
        return self._spectrum

    def spectral(self) -> Spectral:
        """All eigenpairs; a full eigendecomposition of the Gram matrix."""
        if self._spectral is None:
            gram = self.columns.gram()
            values, vectors = eigenpairs(wide(gram))
            keep = values > _noise(gram, float(values[-1]))
            values, vectors = values[keep], vectors[:, keep]
            basis = GramBasis(self.columns, vectors, values)
            self._spectral = Spectral(self.size, values + self.shift, basis, self.shift, self.what)
        return self._spectral

    def mapped(self, function: Function, name: str) -> Structure:
        return self.spectral().mapped(function, name)

    def trace(self) -> float:
        if not any(term.centred for _, term in self.columns.entries):
            return float(wide(self.diagonal()).sum())  # needs no Gram matrix
        return float(wide(self.columns.gram().diagonal()).sum()) + self.size * self.shift

    def logdet(self) -> float:
        values = self._values()
        rest = self.size - len(values)
        if rest and not self.shift:
            return -math.inf
        return float((values + self.shift).log().sum()) + (rest * math.log(self.shift) if rest else 0.0)

    def diagonal(self) -> Tensor:
        entries = self.columns.entries
        centred = [(c, term) for c, term in entries if term.centred]
        if centred:
            return self.spectral().diagonal()
        weights = {term: c for c, term in entries}
        factor = self.columns.factor
        return factor.squares(self.columns.problem, self.columns.snapshot, weights) + self.shift

    def eigh(self) -> Eigh:
        values = self._values() + self.shift
        rest = self.size - len(values)
        return Eigh(values, self.shift, rest, lambda positions: self._vectors(positions, len(values)))

    def _vectors(self, positions: Tensor, count: int) -> Tensor:
        pairs = self.spectral().eigh()
        return pairs.make(positions + len(pairs.eigenvalues) - count)  # aligned at the largest


def _noise(gram: Tensor, largest: float) -> float:
    """The size below which eigenvalues of a Gram matrix are rounding: independent errors of an entry's size in every entry."""
    size = gram.shape[0]
    entry = torch.finfo(gram.dtype).eps * float(gram.diagonal().max())
    return 8 * math.sqrt(size) * entry + size * torch.finfo(torch.float64).eps * largest
