"""A symmetric matrix by its eigenvalues and a basis that is cheap to change into."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvalg.errors import FactsError
from curvalg.lowering.matrices.bases import Basis
from curvalg.lowering.matrices.structure import Eigh, Function, Structure, singular
from curvalg.problem.batch import lazy
from curvalg.problem.kept.reads import Reads
from curvalg.tensors.memory import wide


class Spectral(Structure):
    """The matrix Q diag(values) Qᵀ + rest · (I − Q Qᵀ).

    Args:
        size: n.
        values: eigenvalues (r,), float64.
        basis: Q (n, r).
        rest: eigenvalue of the orthogonal complement, if r < n.
        what: for messages.
        noise: what eigenvalues may be wrong by, relative to the largest; None: the rounding of float64.
    """

    def __init__(
        self,
        size: int,
        values: Tensor,
        basis: Basis,
        rest: float = 0.0,
        what: str = "the matrix",
        noise: float | None = None,
    ) -> None:
        super().__init__(size)
        self.values, self.basis, self.rest, self.what = wide(values), basis, rest, what
        self.noise = torch.finfo(self.values.dtype).eps if noise is None else noise

    @property
    def _complement(self) -> int:
        return self.size - len(self.values)

    def _spectrum(self) -> Tensor:
        """The distinct eigenvalues, without their multiplicities."""
        if not self._complement:
            return self.values
        return torch.cat([self.values, self.values.new_tensor([self.rest])])

    @lazy
    def _rest_is_largest(self) -> bool:
        """Whether the complement outweighs the basis, as in the inverse of a low-rank matrix with a little damping."""
        return bool((self.values.abs() < abs(self.rest)).any())

    def reads(self) -> Reads | str:
        return self.basis.reads()

    def multiply(self, x: Tensor) -> Tensor:
        basis = self.basis
        if not self._complement:
            return basis.synthesise(self.values.to(x.dtype)[:, None] * basis.analyse(x))
        if not self._rest_is_largest:
            weights = (self.values - self.rest).to(x.dtype)[:, None]
            product = basis.synthesise(weights * basis.analyse(x))
            return product.add_(x, alpha=self.rest) if self.rest else product
        # (values − rest) would cancel on the basis, and what one projection leaves there would be multiplied by the rest.
        coordinates = basis.analyse(x)
        beside = x - basis.synthesise(coordinates)
        beside -= basis.synthesise(basis.analyse(beside))
        return basis.synthesise(self.values.to(x.dtype)[:, None] * coordinates).add_(beside, alpha=self.rest)

    def solve(self, b: Tensor) -> Tensor:
        return self._inverse.multiply(b)

    @lazy
    def _inverse(self) -> Spectral:
        """The inverse, found to exist once for all solves."""
        zero = self.values.abs() <= self.noise * self._largest()
        zeros = int(zero.sum()) + (self._complement if not self.rest else 0)
        if zeros:
            raise singular(self.what, zeros)
        return self._function(torch.reciprocal)

    def _largest(self) -> float:
        """The largest eigenvalue by magnitude; 0 where there is none."""
        spectrum = self._spectrum()
        return float(spectrum.abs().max()) if len(spectrum) else 0.0

    def mapped(self, function: Function, name: str) -> Structure:
        if name == "inverse":
            return self._inverse
        if name == "sqrt":
            spectrum = self._spectrum()
            noise = self.size * torch.finfo(spectrum.dtype).eps * self._largest()
            if bool((spectrum < -max(noise, 1e-12 * self._largest())).any()):
                raise FactsError(
                    f"{self.what} has the eigenvalue {float(spectrum.min()):.3g}, so it has no real square root; add "
                    "damping, c * Identity"
                )
            return self._function(lambda v: v.clamp_min(0).sqrt())
        return self._function(function)

    def _function(self, function: Function) -> Spectral:
        rest = float(function(self.values.new_tensor(self.rest))) if self._complement else 0.0
        return Spectral(self.size, function(self.values), self.basis, rest, self.what)

    def trace(self) -> float:
        return float(self.values.sum()) + self._complement * self.rest

    def diagonal(self) -> Tensor:
        return self.basis.squares(self.values - self.rest) + self.rest

    def logdet(self) -> float:
        rest = self._complement * (math.log(abs(self.rest)) if self.rest else -math.inf) if self._complement else 0.0
        return float(self.values.abs().log().sum()) + rest

    def eigh(self) -> Eigh:
        values, order = self.values.sort()
        return Eigh(values, self.rest, self._complement, lambda positions: self.basis.columns(order[positions]))
