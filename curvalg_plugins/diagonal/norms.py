"""Norms of the gradients of single samples."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg import Problem


def gradient_norms(problem: Problem) -> Tensor:
    """‖∇cₙ‖ of every sample, in the order of the data (N,), without a gradient per sample.

    cₙ is the share of sample n: for an unweighted mean loss ∇cₙ is N⁻¹ times the gradient of the sample's own loss. From
    layer inputs h and output deltas δ: ‖δ‖² (‖h‖² + 1) for a linear layer with a bias (Goodfellow, arXiv 1510.01799). With
    ``samples="position"`` the positions of a row follow each other in row-major order; ignored ones have norm zero.

    Args:
        problem: with a loss.

    Raises:
        LossError: a problem without a loss.
        ProblemError: samples influence each other (batch-norm in training mode).

    >>> import torch
    >>> X, y, net = torch.randn(5, 3), torch.randn(5, 1), torch.nn.Linear(3, 1)
    >>> norms = gradient_norms(Problem(net, torch.nn.MSELoss(reduction="sum"), (X, y)))
    >>> g = 2 * (net(X) - y) * torch.cat([X, torch.ones(5, 1)], 1)
    >>> torch.allclose(norms, g.norm(dim=1), rtol=1e-4)
    True
    """
    found: list[Tensor] = []
    with problem.batches() as batches:
        for batch in batches:
            columns = batch.per_sample_columns(batch.loss_gradient[None])
            parts = [
                torch.stack([record.square_norms() for record in batch.layers(some)]).sum(0)
                for some in columns.split(32)
            ]
            found.append(torch.cat(parts).T.reshape(-1))
    return torch.cat(found).sqrt()
