"""Traces by low-rank approximations, with every test vector used twice."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from curvalg.estimate.sampling.error_bar import Rest
from curvalg.estimate.sampling.estimator import Tensors
from curvalg.estimate.traces.range_basis import Range, left_out


class XTrace(Range):
    """The mean over i of tr Q₍ᵢ₎ᵀAQ₍ᵢ₎ + ωᵢᵀ(I − Q₍ᵢ₎Q₍ᵢ₎ᵀ)A(I − Q₍ᵢ₎Q₍ᵢ₎ᵀ)ωᵢ, Q₍ᵢ₎ the basis without the product of ωᵢ.

    With test vectors normalised after the projection. Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 2024.

    The error. Estimate tᵢ is unbiased for any other vectors, so that its variance is that of :class:`Rest`. Of the covariance
    of tᵢ and tⱼ only what neither vector brings alone is left (Hoeffding, Ann. Math. Stat. 1948). Let δᵢⱼ be tᵢ less what it
    would be without vector j at all. Averaged over ωᵢ it is zero, and averaged over ωⱼ a function of ωᵢ: hence E δᵢⱼ δⱼᵢ is
    the covariance, without bias.
    """

    method: ClassVar[str] = "xtrace"

    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """The mean of all m leave-one-out estimates, in O(m³) from inner products."""
        Q, Z, R, n = sketch["basis"], sketch["images"], sketch["triangle"], self.target.size
        if len(R) < columns or len(R) == n:
            # The range is spanned by fewer vectors than were tried, or is everything: nothing is left outside, and R, which
            # the formulas below invert, is singular in the first case.
            return self.integrand.total(self.target, Q, Z), self.noise(R)
        omega, space = self.range_probes(columns), self.target.vectors
        W, T, H = space.inners((Q, omega), (Z, omega), (Q, Z))
        trace = H.diagonal().sum()
        S = left_out(R)
        X = W - S * (S * W).sum(0)  # coefficients of the projection of ωᵢ onto Q₍ᵢ₎
        outside = ((W - X) * R).sum(0) - (T * X).sum(0) + (X * (H @ X)).sum(0)
        scale = (n - columns + 1) / (n - X.square().sum(0))
        outside = outside * scale
        samples = trace - (S * (H @ S)).sum(0) + outside
        projected = R - H @ X
        projected = projected - S * (S * projected).sum(0)
        rest = Rest(Q, Z, omega, None, X, projected - R, scale, outside, n - columns + 1, space)  # AΩ = QR
        changes = samples[:, None] - _without_another(trace, W, T, R, H, S, n)
        error = rest.error(self.target.symmetric, (changes * changes.T).fill_diagonal_(0).sum(1))
        return samples.mean(), torch.hypot(error, self.noise(R))


def _without_another(trace: Tensor, W: Tensor, T: Tensor, R: Tensor, H: Tensor, S: Tensor, n: int) -> Tensor:
    """Estimate i (rows) without test vector j (columns), by the projection Π onto the span of sᵢ and sⱼ.

    With y = Πwᵢ = α sᵢ + β sⱼ, what is outside of the smaller basis is rᵢᵀy − tᵢᵀ(wᵢ − y) + (wᵢ − y)ᵀH(wᵢ − y).
    """
    cosine, w, t = S.T @ S, W.T @ S, T.T @ S
    bent, missed = ((H + H.T) @ W).T @ S, S.T @ H @ S
    room = (1 - cosine.square()).clamp_min(torch.finfo(torch.float64).eps ** 0.5)
    own, lost = w.diagonal()[:, None], missed.diagonal()
    alpha, beta = (own - cosine * w) / room, (w - cosine * own) / room
    whole = (W * (H @ W)).sum(0) - (T * W).sum(0)
    along = (S * R).sum(0)[:, None] + t.diagonal()[:, None] - bent.diagonal()[:, None]
    square = alpha.square() * lost[:, None] + alpha * beta * (missed + missed.T) + beta.square() * lost
    outside = whole[:, None] + alpha * along + beta * (t - bent) + square
    length = n - W.square().sum(0)[:, None] + alpha * own + beta * w
    gone = (lost[:, None] + lost - cosine * (missed + missed.T)) / room
    return trace - gone + outside * (n - len(S) + 2) / length
