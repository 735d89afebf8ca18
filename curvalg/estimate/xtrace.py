"""Traces by low-rank approximations of the range, with every test vector used twice."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from curvalg.estimate.probes import inner, pairwise
from curvalg.estimate.sketch import Sketch, Tensors, standard_error
from curvalg.solve.orthogonal import grown, orthonormalise


class Range(Sketch):
    """An orthonormal basis Q of the range of A Ω, with its images; Q R = A Ω."""

    multiplications: ClassVar[int] = 2

    def empty(self) -> Tensors:
        """An empty basis."""
        none = self._no_rows()
        return {"basis": none, "images": none, "triangle": torch.zeros(0, 0, dtype=torch.float64)}

    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        """The basis with new directions; old ones stay, and so do their images."""
        extended = self.with_range_of(sketch, self._multiply(self.probes.rows(start, stop)))
        return extended, stop - start + len(extended["basis"]) - len(sketch["basis"])

    def with_range_of(self, sketch: Tensors, products: Tensor) -> Tensors:
        """The basis with the directions of more products (p, n), all of them multiplied."""
        device = self.target.space.device
        basis, images, triangle = sketch["basis"].to(device), sketch["images"].to(device), sketch["triangle"]
        scale = float(triangle.norm(dim=0).max()) if triangle.numel() else 0.0
        directions, coefficients, coupling = orthonormalise(products, basis, scale)
        new = len(directions)
        if new:
            room = self._columns(self.products)
            images = grown(images, self._multiply(directions), room)
            basis = grown(basis, directions, room)
        below = torch.cat([torch.zeros(new, triangle.shape[1], dtype=torch.float64), coupling], 1)
        above = torch.cat([triangle, coefficients.T], 1)
        return {"basis": basis, "images": images, "triangle": torch.cat([above, below])}

    def noise(self, triangle: Tensor) -> Tensor:
        """What may be left of the trace outside of a basis that holds all of the range but rounding noise.

        n eigenvalues of random signs, each of the size of the rounding unit times ‖A‖_F.
        """
        frobenius = triangle.norm() / max(1, triangle.shape[1]) ** 0.5
        return torch.finfo(self.target.space.dtype).eps * self.target.size**0.5 * frobenius


class XTrace(Range):
    """The mean over i of tr Q₍ᵢ₎ᵀAQ₍ᵢ₎ + ωᵢᵀ(I − Q₍ᵢ₎Q₍ᵢ₎ᵀ)A(I − Q₍ᵢ₎Q₍ᵢ₎ᵀ)ωᵢ, Q₍ᵢ₎ the basis without the product of ωᵢ.

    With test vectors normalised after the projection. Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 2024.
    """

    method: ClassVar[str] = "xtrace"

    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """All m leave-one-out estimates in O(m³) from inner products."""
        Q, Z, R, n = sketch["basis"], sketch["images"], sketch["triangle"], self.target.size
        trace = pairwise(Q, Z).sum()
        if len(R) < columns or len(R) == n:
            # The range is spanned by fewer vectors than were tried, or is everything: nothing is left outside, and R, which
            # the formulas below invert, is singular in the first case.
            return trace, self.noise(R)
        omega = self.probes.rows(0, columns)
        W, T, H = inner(Q, omega), inner(Z, omega), inner(Q, Z)
        S = left_out(R)
        X = W - S * (S * W).sum(0)  # coefficients of the projection of ωᵢ onto Q₍ᵢ₎
        outside = ((W - X) * R).sum(0) - (T * X).sum(0) + (X * (H @ X)).sum(0)
        outside = outside * (n - columns + 1) / (n - X.square().sum(0))
        samples = trace - (S * (H @ S)).sum(0) + outside
        return samples.mean(), torch.hypot(standard_error(samples), self.noise(R))


class HutchPlusPlus(Range):
    """tr QᵀAQ + the mean of gᵀ(I − QQᵀ)A(I − QQᵀ)g over vectors g that Q does not depend on.

    Meyer, Musco, Musco and Woodruff, SOSA 2021. Even test vectors make the basis, odd ones the samples.
    """

    method: ClassVar[str] = "hutch++"
    multiplications: ClassVar[int] = 3

    def empty(self) -> Tensors:
        """With the products of the g."""
        return {**super().empty(), "products of samples": self._no_rows()}

    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        """Both kinds of vectors are multiplied at once."""
        products = self._multiply(self.probes.rows(2 * start, 2 * stop))
        extended = self.with_range_of(sketch, products[::2])
        before = sketch["products of samples"].to(products.device)
        extended["products of samples"] = grown(before, products[1::2].contiguous(), self._columns(self.products))
        return extended, 2 * (stop - start) + len(extended["basis"]) - len(sketch["basis"])

    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """From inner products, so that g need not be projected before it is multiplied."""
        Q, Z, R, n = sketch["basis"], sketch["images"], sketch["triangle"], self.target.size
        trace = pairwise(Q, Z).sum()
        if len(R) < columns or len(R) == n:
            return trace, self.noise(R)
        g, images = self.probes.rows(0, 2 * columns)[1::2], sketch["products of samples"].to(Q.device)
        X, T, Y, H = inner(Q, g), inner(Z, g), inner(Q, images), inner(Q, Z)
        outside = pairwise(g, images) - (T * X).sum(0) - (X * Y).sum(0) + (X * (H @ X)).sum(0)
        outside = outside * (n - columns) / (n - X.square().sum(0))
        return trace + outside.mean(), torch.hypot(standard_error(outside), self.noise(R))


def left_out(triangle: Tensor) -> Tensor:
    """Unit vectors sᵢ (columns) so that Q₍ᵢ₎Q₍ᵢ₎ᵀ = Q(I − sᵢsᵢᵀ)Qᵀ: orthogonal to all columns of R but number i."""
    inverse = torch.linalg.inv(triangle).T
    return inverse / inverse.norm(dim=0)
