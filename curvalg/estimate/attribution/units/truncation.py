"""Best low-rank approximations of stacks of matrices, as factors with the norm of what they leave out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankMatrices:
    """Matrices U Vᵀ, some (groups) for each of P things.

    Args:
        left: U (P, groups, out, r).
        right: V (P, groups, in, r).
        discarded: Frobenius norm of what they leave out of the matrices that they stand for, all groups together (P,).
    """

    left: Tensor
    right: Tensor
    discarded: Tensor

    def changed(self, output: Tensor, inputs: Tensor) -> LowRankMatrices:
        """The matrices (Q U) (R V)ᵀ for orthogonal Q (groups, out, out) and R (groups, in, in)."""
        return LowRankMatrices(output @ self.left, inputs @ self.right, self.discarded)

    def and_(self, other: LowRankMatrices) -> LowRankMatrices:
        """These and those of other things."""
        mine, its = ((some.left, some.right, some.discarded) for some in (self, other))
        return LowRankMatrices(*(torch.cat(pair) for pair in zip(mine, its, strict=True)))


def truncated(matrices: Tensor, rank: int) -> LowRankMatrices:
    """The best approximations of some rank of matrices (P, groups, out, in), by singular values.

    Nothing is left out where the rank is at least the smaller side.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        turned = truncated(matrices.mT, rank)
        return LowRankMatrices(turned.right, turned.left, turned.discarded)
    side = matrices.shape[-2]
    if rank >= side:
        eye = torch.eye(side, dtype=matrices.dtype, device=matrices.device)
        return LowRankMatrices(
            eye.expand(*matrices.shape[:2], -1, -1), matrices.mT, matrices.new_zeros(matrices.shape[0])
        )
    left, others = _leading(matrices, rank)
    return LowRankMatrices(left, matrices.mT @ left, norms(others.flatten(1), 1))


def _leading(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors, and the singular values of the others."""
    if matrices.dtype == torch.float64:
        left, values, _ = torch.linalg.svd(matrices, full_matrices=False)
        return left[..., :rank], values[..., rank:]
    # In double precision the squares of singular values are exact to more than single precision, at a third of the time.
    wide = matrices.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    leading = vectors[..., -rank:].to(matrices.dtype)
    return leading, values[..., :-rank].clamp(min=0).sqrt().to(matrices.dtype)


def norms(vectors: Tensor, axis: int) -> Tensor:
    """Euclidean norms along an axis, also of numbers whose squares would be zero, as gradients of what was learnt by heart."""
    largest = vectors.abs().amax(axis, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    lengths: Tensor = torch.linalg.vector_norm(vectors / scale, dim=axis, keepdim=True) * scale
    return lengths.squeeze(axis)
