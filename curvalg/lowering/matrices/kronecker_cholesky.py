"""An undamped Kronecker product of symmetric factors: solved by a factorisation of each, looked into by its spectrum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvalg.lowering.matrices.bases import kronecker
from curvalg.lowering.matrices.structure import Eigh, Function, Structure
from curvalg.problem.batch import lazy
from curvalg.solve import NOISE, condition
from curvalg.tensors.memory import wide


class KroneckerCholesky(Structure):
    """The product s · F₁ ⊗ F₂ ⊗ … of symmetric factors.

    A Cholesky factorisation takes a thirtieth of the time of an eigendecomposition. Factors that are not positive definite, and
    all questions but products and solves, are answered by the spectrum.

    Args:
        factors: in the precision of the problem; they are factorised in float64 where that does not suffice.
        scale: s.
        spectral: makes the same matrix by its eigenvalues.
    """

    def __init__(self, factors: Sequence[Tensor], scale: float, spectral: Callable[[], Structure]) -> None:
        size = 1
        for factor in factors:
            size *= factor.shape[0]
        super().__init__(size)
        self.factors, self.scale, self._spectral = list(factors), scale, spectral

    @lazy
    def _triangles(self) -> list[Tensor] | None:
        """The Cholesky factors, in the order of the factors; None where one is not positive definite to working precision."""
        noise = [NOISE * torch.finfo(factor.dtype).eps for factor in self.factors]
        found = [_triangle(*each) for each in zip(self.factors, noise, strict=True)]
        if any(triangle is None for triangle in found):
            found = [_triangle(wide(factor), own) for factor, own in zip(self.factors, noise, strict=True)]
        known = [triangle for triangle in found if triangle is not None]
        return known if len(known) == len(found) else None

    @lazy
    def by_eigenvalues(self) -> Structure:
        """The same matrix, by its eigenvalues."""
        return self._spectral()

    def multiply(self, x: Tensor) -> Tensor:
        return self.scale * kronecker([f.to(x.dtype) for f in self.factors], x)

    def solve(self, b: Tensor) -> Tensor:
        if self._triangles is None or not self.scale:
            return self.by_eigenvalues.solve(b)
        result = b.to(self._triangles[0].dtype).reshape(*[f.shape[0] for f in self.factors], b.shape[1])
        for axis, triangle in enumerate(self._triangles):
            moved = result.movedim(axis, 0)
            result = torch.cholesky_solve(moved.flatten(1), triangle).reshape(moved.shape).movedim(0, axis)
        return (result.reshape(b.shape) / self.scale).to(b.dtype)

    def mapped(self, function: Function, name: str) -> Structure | None:
        return self.by_eigenvalues.mapped(function, name)

    def trace(self) -> float | None:
        return self.by_eigenvalues.trace()

    def diagonal(self) -> Tensor | None:
        return self.by_eigenvalues.diagonal()

    def logdet(self) -> float | None:
        return self.by_eigenvalues.logdet()

    def eigh(self) -> Eigh | None:
        return self.by_eigenvalues.eigh()


def _triangle(factor: Tensor, noise: float) -> Tensor | None:
    """The Cholesky factor of a matrix whose condition its precision can bear, or None.

    Args:
        factor: the matrix.
        noise: what its eigenvalues may be wrong by, relative to the largest: one that is no larger is zero.
    """
    found: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(factor)
    triangle, failed = found
    if not len(factor):
        return triangle
    ends = triangle.diagonal()
    # The ratio of the ends is at most the root of the condition number, of which rounding takes a share of eps.
    ratio = 0.0 if int(failed) else float(ends.min()) / float(ends.max())
    if not ratio > torch.finfo(factor.dtype).eps ** 0.375:
        return None
    # The last of n ends can be that much larger than the root of the smallest eigenvalue.
    suspicious = ratio**2 <= len(factor) * noise
    if suspicious and condition(factor, lambda b: torch.cholesky_solve(b, triangle)) * noise >= 1:
        return None
    return triangle
