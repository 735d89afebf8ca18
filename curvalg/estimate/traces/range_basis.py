"""Low-rank approximations of the range of an operator, for traces and diagonals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from curvalg.estimate.sampling.estimator import Estimator, Tensors, independent
from curvalg.runs.run_state import Form
from curvalg.solve.orthogonal import grown, orthonormalise


class Range(Estimator):
    """An orthonormal basis Q of the range of A Ω, with its images; Q R = A Ω."""

    multiplications: ClassVar[int] = 2
    axes: ClassVar[Mapping[str, int]] = {"basis": 1, "images": 1}

    def form(self, columns: int) -> Form:
        """A basis with its images, and a column of the triangle for each test vector."""
        rows = self.target.space.dtype, ("k", self.target.local)
        return {"basis": rows, "images": rows, "triangle": (torch.float64, ("k", columns))}

    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        """The basis with new directions; old ones stay, and so do their images."""
        extended = self.with_range_of(sketch, self.multiply(self.probes.rows(start, stop, self.room)))
        return extended, stop - start + len(extended["basis"]) - len(sketch["basis"])

    def range_probes(self, columns: int) -> Tensor:
        """The rows of Ωᵀ, the test vectors."""
        return self.probes.rows(0, columns)

    def with_range_of(self, sketch: Tensors, products: Tensor) -> Tensors:
        """The basis with the directions of more products (p, n), all of them multiplied."""
        basis, images, triangle = sketch["basis"], sketch["images"], sketch["triangle"]
        scale = float(triangle.norm(dim=0).max()) if triangle.numel() else 0.0
        directions, coefficients, coupling = orthonormalise(products, basis, scale, space=self.target.vectors)
        new = len(directions)
        if new:
            room = self.room
            images = grown(images, self.images(directions), room)
            basis = grown(basis, directions, room)
        below = torch.cat([torch.zeros(new, triangle.shape[1], dtype=torch.float64, device="cpu"), coupling], 1)
        above = torch.cat([triangle, coefficients.T], 1)
        return {"basis": basis, "images": images, "triangle": torch.cat([above, below])}

    def tested(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """All test vectors with their products."""
        Q, R = sketch["basis"], sketch["triangle"]
        return self.range_probes(columns), R.T.to(Q) @ Q

    def known(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """The basis, and the parts of the test vectors that are orthogonal to it."""
        Q, Z = sketch["basis"], sketch["images"]
        omega, products = self.tested(sketch, columns)
        space = self.target.vectors
        W = space.inner(omega, Q).to(Q)
        rows, images = independent(omega - W @ Q, products - W @ Z, space)
        rows = rows - space.gram(rows, Q) @ Q
        return torch.cat([Q, rows]), torch.cat([Z, images])

    def noise(self, triangle: Tensor) -> Tensor:
        """The size of what may be left of the trace outside of a basis that holds all of the range but rounding noise.

        n eigenvalues of random signs, each of the size of the rounding unit times ‖A‖_F.
        """
        frobenius: Tensor = triangle.norm() / math.sqrt(max(1, triangle.shape[1]))
        return frobenius * (torch.finfo(self.target.space.dtype).eps * math.sqrt(self.target.size))


def left_out(triangle: Tensor) -> Tensor:
    """Unit vectors sᵢ (columns) so that Q₍ᵢ₎Q₍ᵢ₎ᵀ = Q(I − sᵢsᵢᵀ)Qᵀ: orthogonal to all columns of R but number i."""
    inverse: Tensor = torch.linalg.inv(triangle).T
    lengths: Tensor = inverse.norm(dim=0)
    return inverse / lengths
