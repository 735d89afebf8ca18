"""Traces of positive semi-definite operators in one round of products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from curvalg.errors import FactsError
from curvalg.estimate.sampling.error_bar import shared_error, standard_error
from curvalg.estimate.sampling.estimator import Estimator, Tensors, independent
from curvalg.runs.run_state import Form
from curvalg.solve.orthogonal import grown, triangle_of
from curvalg.tensors.memory import small


class XNysTrace(Estimator):
    """The mean over i of tr A⟨Ω₍ᵢ₎⟩ + ωᵢᵀ(A − A⟨Ω₍ᵢ₎⟩)ωᵢ, with the Nyström approximation A⟨Ω⟩ = AΩ (ΩᵀAΩ)⁻¹ (AΩ)ᵀ.

    With test vectors normalised after the projection. Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 2024.
    """

    method: ClassVar[str] = "xnystrace"
    safety: ClassVar[float] = 1.9
    axes: ClassVar[Mapping[str, int]] = {"sketch": 1}

    def form(self, columns: int) -> Form:
        """The products of all test vectors."""
        return {"sketch": (self.target.space.dtype, (columns, self.target.local))}

    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        """The sketch with more products."""
        products = self.multiply(self.probes.rows(start, stop, self.room))
        room = self.room
        return {"sketch": grown(sketch["sketch"], products, room)}, stop - start

    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """All m leave-one-out estimates in O(n m²)."""
        Y, omega, n = sketch["sketch"], self.probes.rows(0, columns), self.target.size
        space = self.target.vectors
        size = float(small(torch.linalg.vector_norm(space.lengths(Y))))
        if not size:
            return torch.zeros((), dtype=torch.float64, device="cpu"), torch.zeros(
                (), dtype=torch.float64, device="cpu"
            )
        gram, inner = space.inners((omega, omega), (omega, Y))
        core, shift = self._shifted(inner, gram, size / n**0.5)
        C = torch.linalg.cholesky(core, upper=True)
        R = triangle_of(Y + shift * omega, space)
        B = torch.linalg.solve_triangular(C, R, upper=True, left=False)
        inverse = torch.linalg.solve_triangular(C, torch.eye(columns, dtype=torch.float64, device="cpu"), upper=True)
        pivots = 1 / inverse.square().sum(1)  # ωᵢᵀ(A − A⟨Ω₍ᵢ₎⟩)ωᵢ, with A shifted
        S = B @ inverse.T * pivots.sqrt()  # its squared columns are what tr A⟨Ω⟩ loses without ωᵢ
        free = (n - columns + 1) * torch.linalg.inv(gram).diagonal()  # normalises what is left of ωᵢ outside of Ω₍ᵢ₎
        samples = B.square().sum() - S.square().sum(0) + free * pivots - shift * n
        noise = torch.finfo(Y.dtype).eps * size
        missed = S.square().sum(0)
        error = torch.hypot(standard_error(samples), shared_error(S / missed.sqrt(), missed))
        return samples.mean(), torch.hypot(error if columns < n else 0 * missed[0], missed.new_tensor(noise))

    def known(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """All test vectors with their products."""
        return independent(self.probes.rows(0, columns), sketch["sketch"], self.target.vectors)

    def _shifted(self, core: Tensor, gram: Tensor, scale: float) -> tuple[Tensor, float]:
        """The matrix ΩᵀAΩ with A + shift · I in place of A: rounding must not make it indefinite."""
        eps = torch.finfo(self.target.space.dtype).eps
        shift, smallest = eps * scale, float(torch.linalg.eigvalsh(gram)[0])
        core = (core + core.T) / 2
        while shift <= eps**0.5 * scale:
            shifted = core + shift * gram
            if float(torch.linalg.eigvalsh(shifted)[0]) > shift * smallest / 2:
                return shifted, shift
            shift *= 4
        raise FactsError(
            f"expected a positive semi-definite operator, but ωᵀAω < 0 for a combination ω of test vectors and A = "
            f"{self.target.name}; use method='xtrace'"
        )
