"""Extended gradients: for every sample i and class k the direction p_i − e_k in output space, with its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import Batch


class Extended:
    """The gradients g_ik = J_iᵀ (p_i − e_k) with weights w_ik = α_i p_ik, so that Σ_ik w_ik g_ik g_ikᵀ is the GGN exactly.

    Everything is laid out by position, (P, C) with P = rows times positions and C classes.

    Args:
        batch: of a softmax loss.
    """

    def __init__(self, batch: Batch) -> None:
        axis = batch.class_axis
        assert axis is not None
        self._axis, self._shape = axis, batch.output.movedim(axis, -1).shape
        self.p = self.by_position(batch.output.softmax(axis))
        self.classes = self.p.shape[1]
        self._likeliest = self.p.argmax(1, keepdim=True)
        self._saturated = self.p.gather(1, self._likeliest) > 0.5
        weights = batch.weights.to(batch.output.dtype).expand(batch.output.shape)
        self.w = self.by_position(weights) * self.p
        # By methods of tensors alone: listing the terms must not import torch.
        self.own = self.p.new_zeros(self.p.shape).scatter_(1, batch.labels.reshape(-1, 1), 1.0)
        """1 where k is the label, (P, C)."""

    def by_position(self, tensor: Tensor) -> Tensor:
        """A tensor of the output's shape as (P, C)."""
        return tensor.movedim(self._axis, -1).reshape(-1, self._shape[-1])

    def by_output(self, tensor: Tensor) -> Tensor:
        """A tensor (P, C) in the output's shape."""
        return tensor.reshape(self._shape).movedim(-1, self._axis)

    def slopes(self, tangent: Tensor) -> Tensor:
        """The slopes s_ik = (p_i − e_k)ᵀ ż_i = g_ikᵀ v, (P, C).

        From differences to the likeliest class, which p_i − e_k does not see: where its probability is nearly 1, ⟨p, ż⟩ − ż_k
        would lose all digits.
        """
        t = self.by_position(tangent)
        t = t - t.gather(1, self._likeliest)
        return (self.p * t).sum(1, keepdim=True) - t

    def class_sums(self, values: Tensor) -> Tensor:
        """The sums over samples of class c of values (P, C), as a matrix [c, k]."""
        return self.own.T @ values

    def of_label(self, table: Tensor) -> Tensor:
        """The row of every sample's class in a table [c, k], (P, C)."""
        return self.own @ table

    def cotangent(self, coefficients: Tensor) -> Tensor:
        """The cotangent Σ_k a_ik (p_i − e_k) for coefficients a (P, C), of the output's shape.

        Sums over classes vanish, so that a class of probability nearly 1, where terms cancel, is minus all others.
        """
        result = self.p * coefficients.sum(1, keepdim=True) - coefficients
        own = result.gather(1, self._likeliest)
        rest = result.scatter(1, self._likeliest, 0.0).sum(1, keepdim=True)
        return self.by_output(result.scatter(1, self._likeliest, (-rest).where(self._saturated, own)))


def divided(sums: Tensor, weights: Tensor) -> Tensor:
    """The quotient sums / weights, zero where the weight is: a class that is empty or of weight zero has no mean."""
    positive = weights > 0
    quotient: Tensor = sums.where(positive, 0.0) / weights.where(positive, 1.0)
    return quotient


def off_diagonal(classes: int, like: Tensor) -> Tensor:
    """A matrix with 1 where k ≠ c, else 0."""
    return like.new_ones(classes, classes).fill_diagonal_(0)
