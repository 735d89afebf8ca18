"""Traces by low-rank approximations, with every test vector used twice."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from curvalg.estimate.probes import inner, pairwise
from curvalg.estimate.range import Range, left_out, shared_error
from curvalg.estimate.sketch import Tensors, standard_error


class XTrace(Range):
    """The mean over i of tr Q₍ᵢ₎ᵀAQ₍ᵢ₎ + ωᵢᵀ(I − Q₍ᵢ₎Q₍ᵢ₎ᵀ)A(I − Q₍ᵢ₎Q₍ᵢ₎ᵀ)ωᵢ, Q₍ᵢ₎ the basis without the product of ωᵢ.

    With test vectors normalised after the projection. Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 2024.
    """

    method: ClassVar[str] = "xtrace"
    safety: ClassVar[float] = 1.25

    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """All m leave-one-out estimates in O(m³) from inner products."""
        Q, Z, R, n = sketch["basis"], sketch["images"], sketch["triangle"], self.target.size
        trace = pairwise(Q, Z).sum()
        if len(R) < columns or len(R) == n:
            # The range is spanned by fewer vectors than were tried, or is everything: nothing is left outside, and R, which
            # the formulas below invert, is singular in the first case.
            return trace, self.noise(R)
        omega = self.range_probes(columns)
        W, T, H = inner(Q, omega), inner(Z, omega), inner(Q, Z)
        S = left_out(R)
        X = W - S * (S * W).sum(0)  # coefficients of the projection of ωᵢ onto Q₍ᵢ₎
        outside = ((W - X) * R).sum(0) - (T * X).sum(0) + (X * (H @ X)).sum(0)
        outside = outside * (n - columns + 1) / (n - X.square().sum(0))
        missed = (S * (H @ S)).sum(0)
        samples = trace - missed + outside
        error = torch.hypot(standard_error(samples), shared_error(S, missed.abs()))
        return samples.mean(), torch.hypot(error, self.noise(R))
