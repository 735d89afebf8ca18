"""Terms that a third party might ship, one per contract, with their dense references in the tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from curvalg import (
    Block,
    DatasetTerm,
    Diagonal,
    Facts,
    GradientTerm,
    Kronecker,
    LowRank,
    MatrixTerm,
    Term,
    block_diagonal,
)


@dataclass(frozen=True)
class Skewed(Term):
    """Σ Jᵀ S J plus the residual, with a shift S that is not symmetric: output i feels tangent i + 1."""

    power: float = 1.0

    def cotangent(self, batch):
        return batch.loss_gradient

    def cotangent_dot(self, batch, tangent):
        return self.power * tangent.roll(1, -1)


@dataclass(frozen=True)
class MeanTangent(DatasetTerm):
    """∇L (Σₙ 1ᵀ Jₙ): needs the total of all tangents in a pass of its own; not symmetric."""

    def reduce(self, batch, tangent, prepared):
        return {"total": tangent.sum()}

    def cotangent_dot(self, batch, tangent, prepared, totals):
        return batch.loss_gradient * totals["total"]


@dataclass(frozen=True)
class CenteredTangent(DatasetTerm):
    """Σₙ (Jₙ - mean J)ᵀ (Jₙ - mean J), with the mean over all samples; symmetric."""

    def facts(self, loss=None):
        return Facts(psd=True)

    def reduce(self, batch, tangent, prepared):
        return tangent.sum(0, keepdim=True)

    def cotangent_dot(self, batch, tangent, prepared, totals):
        return tangent - totals / batch.count


@dataclass(frozen=True)
class GradientOuter(MatrixTerm):
    """c ∇L ∇Lᵀ / |∇L|², by two passes: the norm, then the gradient."""

    scale: float = 1.0

    def prepare(self, batch):
        return batch.vjp(batch.loss_gradient)

    def accumulate(self, batch, prepared=None):
        return batch.vjp(batch.loss_gradient) / prepared.norm()

    def finish(self, stats, layout, prepared=None):
        return self.scale * LowRank(stats[:, None])


@dataclass(frozen=True)
class WeightedBlocks(MatrixTerm):
    """A block per parameter: Kronecker of Gram matrices for weights, the identity of squares for biases."""

    def accumulate(self, batch, prepared=None):
        gradients = batch.per_sample_gradients()
        return {name: g.sum(0) for name, g in gradients.items()}

    def finish(self, stats, layout, prepared=None):
        return block_diagonal([Block((name,), self._leaf(g)) for name, g in stats.items()])

    def _leaf(self, g):
        return Diagonal(g.square()) if g.ndim == 1 else Kronecker(g @ g.T, g.T @ g)


def dense_weighted_blocks(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    """The dense matrix of :class:`WeightedBlocks`."""
    blocks = [torch.diag(g.square()) if g.ndim == 1 else torch.kron(g @ g.T, g.T @ g) for g in gradient.values()]
    return torch.block_diag(*blocks)


@dataclass(frozen=True)
class ForwardDifference(GradientTerm):
    """The Hessian by differences of gradients on one side, with a step that is fixed."""

    step: float = 1e-6

    def multiply(self, gradients, vector):
        length = gradients.norm(vector)
        if not length:
            return vector.clone()
        ahead = gradients.at(gradients.parameters + self.step / length * vector)
        return (ahead - gradients.here) * (length / self.step)

    def lines(self, gradients):
        return [f"a step of {self.step:g} on one side"]
