"""Diagonals by low-rank approximations, with every test vector used twice."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from curvalg.errors import FactsError
from curvalg.estimate.sampling.error_bar import standard_error
from curvalg.estimate.sampling.estimator import Tensors
from curvalg.estimate.traces.range_basis import Range, left_out
from curvalg.tensors.memory import wide
from curvalg.tensors.spaces import VectorSpace
from curvalg.tensors.spaces.long_vectors import parts


class XDiag(Range):
    """The mean over i of diag Q₍ᵢ₎Q₍ᵢ₎ᵀA + ωᵢ ⊙ (I − Q₍ᵢ₎Q₍ᵢ₎ᵀ)Aωᵢ, Q₍ᵢ₎ the basis without the product of ωᵢ.

    Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 2024. The images of the basis are those under Aᵀ.
    """

    method: ClassVar[str] = "xdiag"
    safety: ClassVar[float] = 1.25

    def images(self, rows: Tensor) -> Tensor:
        """The products AᵀQ."""
        if self.target.symmetric:
            return self.multiply(rows)
        try:
            return self.target.adjoint(rows.T).T.contiguous()
        except FactsError as error:
            raise FactsError(f"{error}, or use method='hutchinson'") from error

    def known(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """The basis; of test vectors the products with A, not Aᵀ, are known."""
        return super().known(sketch, columns) if self.target.symmetric else (sketch["basis"], sketch["images"])

    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """All leave-one-out estimates, some entries at a time."""
        Q, Z, R, n = sketch["basis"], sketch["images"], sketch["triangle"], self.target.size
        value, omega = self.integrand.total(self.target, Q, Z), self.range_probes(columns)
        if len(R) < columns:
            # Of few entries, the same signs may be drawn twice: then R is singular and still not all of the range is there.
            kept = distinct(omega, self.target.vectors)
            R, omega, columns = R[:, kept], omega[kept], int(kept.sum())
        if len(R) < columns or len(R) == n:
            return value, torch.full_like(value, float(self.noise(R)) / n**0.5)
        S = left_out(R)
        outside = (S * R).sum(0)[:, None].to(value)
        alike = (S.T @ S).square().to(value)
        error = torch.empty_like(value)
        for part in parts(Q.shape[1], len(Q), Q.device):
            left, right = (S.T.to(value) @ wide(rows[:, part]) for rows in (Q, Z))
            samples = left * (outside * wide(omega[:, part]) - right)
            value[part] += samples.mean(0)
            missed = left * right  # as of error_bar.shared_error, entry by entry
            shared = (missed * (alike @ missed)).sum(0).clamp_min(0).sqrt() / columns
            error[part] = torch.hypot(standard_error(samples), shared)
        return value, torch.hypot(error, torch.full_like(error, float(self.noise(R)) / n**0.5))


def distinct(rows: Tensor, space: VectorSpace) -> Tensor:
    """The mask (m,) of rows that are no linear combinations of those before them."""
    triangle = torch.linalg.qr(space.inner(rows, rows), mode="r").R
    pivots: Tensor = triangle.diagonal().abs()
    return pivots > 1e-9 * space.size
