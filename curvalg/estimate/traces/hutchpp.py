"""Traces by a low-rank approximation and independent samples of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from curvalg.estimate.sampling.error_bar import Rest
from curvalg.estimate.sampling.estimator import Tensors
from curvalg.estimate.traces.range_basis import Range
from curvalg.runs.run_state import Form
from curvalg.solve.orthogonal import grown


class HutchPlusPlus(Range):
    """The estimate tr QᵀAQ + the mean of gᵀ(I − QQᵀ)A(I − QQᵀ)g over vectors g that Q does not depend on.

    Meyer, Musco, Musco and Woodruff, SOSA 2021. Even test vectors make the basis, odd ones the samples.
    """

    method: ClassVar[str] = "hutch++"
    multiplications: ClassVar[int] = 3
    axes: ClassVar[Mapping[str, int]] = {"basis": 1, "images": 1, "products of samples": 1}

    def form(self, columns: int) -> Form:
        """The basis, and the products of the g."""
        return {**super().form(columns), "products of samples": (self.target.space.dtype, (columns, self.target.local))}

    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        """The sketch after both kinds of vectors were multiplied at once."""
        products = self.multiply(self.probes.rows(2 * start, 2 * stop, 2 * self.room))
        extended = self.with_range_of(sketch, products[::2])
        before = sketch["products of samples"]
        extended["products of samples"] = grown(before, products[1::2].contiguous(), self.room)
        return extended, 2 * (stop - start) + len(extended["basis"]) - len(sketch["basis"])

    def range_probes(self, columns: int) -> Tensor:
        """Every other test vector."""
        return self.probes.rows(0, 2 * columns)[::2]

    def tested(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """The test vectors of both kinds, with their products."""
        omega, products = super().tested(sketch, columns)
        samples = self.probes.rows(0, 2 * columns)[1::2]
        return torch.cat([omega, samples]), torch.cat([products, sketch["products of samples"]])

    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """The estimate from inner products, so that g need not be projected before it is multiplied."""
        Q, Z, R, n = sketch["basis"], sketch["images"], sketch["triangle"], self.target.size
        trace = self.integrand.total(self.target, Q, Z)
        if len(R) < columns or len(R) == n:
            return trace, self.noise(R)
        g, images = self.probes.rows(0, 2 * columns)[1::2], sketch["products of samples"]
        X, T, Y, H = self.target.vectors.inners((Q, g), (Z, g), (Q, images), (Q, Z))
        outside = (
            self.integrand.samples(self.target, g, images) - (T * X).sum(0) - (X * Y).sum(0) + (X * (H @ X)).sum(0)
        )
        scale = (n - columns) / (n - X.square().sum(0))
        outside = outside * scale
        rest = Rest(Q, Z, g, images, X, Y - H @ X, scale, outside, n - columns, self.target.vectors)
        return trace + outside.mean(), torch.hypot(rest.error(self.target.symmetric), self.noise(R))
