"""Norms of the gradients of single samples, and the gradient noise scale."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.distributed.group import shared_call
from curvalg.errors import ProblemError
from curvalg.estimate.result import Result
from curvalg.estimate.target import require_problem
from curvalg.problem import Problem
from curvalg.tensors.memory import wide

WIDTH = 32
"""Columns that are taken through the network at a time."""


@shared_call
def gradient_norms(problem: Problem) -> Tensor:
    """Norms ‖∇cₙ‖ of every sample's gradient, in the order of the data (N,), without a gradient per sample.

    cₙ is the share of sample n: for an unweighted mean loss ∇cₙ is N⁻¹ times the gradient of the sample's own loss. From
    layer inputs h and output deltas δ: ‖δ‖² (‖h‖² + 1) for a linear layer with a bias (Goodfellow, arXiv 1510.01799). With
    ``samples="position"`` the positions of a row follow each other in row-major order; ignored ones have norm zero.

    Args:
        problem: with a loss.

    Raises:
        ExpressionError: no problem.
        LossError: a problem without a loss.
        ProblemError: samples influence each other (batch-norm in training mode).

    >>> import torch
    >>> from curvalg import Problem
    >>> X, y, net = torch.randn(5, 3), torch.randn(5, 1), torch.nn.Linear(3, 1)
    >>> norms = gradient_norms(Problem(net, torch.nn.MSELoss(reduction="sum"), (X, y)))
    >>> g = 2 * (net(X) - y) * torch.cat([X, torch.ones(5, 1)], 1)
    >>> torch.allclose(norms, g.norm(dim=1), rtol=1e-4)
    True
    """
    require_problem(problem, "gradient_norms")
    found: list[Tensor] = []
    with problem.batches() as batches:
        for batch in batches:
            columns = batch.per_sample_columns(batch.loss_gradient[None])
            parts = [
                torch.stack([record.square_norms() for record in batch.layers(some)]).sum(0)
                for some in columns.split(WIDTH)
            ]
            found.append(torch.cat(parts).T.reshape(-1))
    return problem.group.rows(
        torch.cat(found).sqrt() if found else torch.zeros(0, dtype=problem.dtype, device=problem.device)
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class GradientNoise(Result):
    """The noise of minibatch gradients, with the simple noise scale.

    Args:
        simple: the simple noise scale tr Σ / |G|², in samples; infinite where |G|² cannot be distinguished from zero.
        trace: tr Σ, unbiased, of the gradients of single samples around their mean.
        square: |G|², unbiased: the squared norm of the true gradient. It may be negative.
    """

    simple: float
    trace: float
    square: float

    @property
    def findings(self) -> dict[str, str]:
        return {"simple scale": f"{self.simple:.4g} samples", "tr Σ": f"{self.trace:.4g}", "|G|²": f"{self.square:.4g}"}


@shared_call
def gradient_noise(problem: Problem) -> GradientNoise:
    """The simple gradient noise scale B = tr Σ / |G|²: batches much smaller waste steps, much larger ones samples.

    With m = N⁻¹ Σ |gₙ|² and ḡ = N⁻¹ Σ gₙ over the gradients gₙ of the samples' own losses, tr Σ = N (m − |ḡ|²) / (N − 1) and
    |G|² = (N |ḡ|² − m) / (N − 1) without bias. Exact over the data set: one pass for the norms, one for the gradient.
    McCandlish et al., arXiv 1812.06162.

    Args:
        problem: with a loss, and at least two samples.

    Raises:
        LossError: a problem without a loss.
        ProblemError: fewer than two samples; samples influence each other.

    >>> import torch
    >>> from curvalg import Problem
    >>> X, y = torch.randn(50, 3), torch.randn(50, 1)
    >>> noise = gradient_noise(Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (X, y)))
    >>> noise.trace > 0, noise.method
    (True, 'exact')
    """
    require_problem(problem, "gradient_noise")
    begin, totals = time.perf_counter(), problem.totals
    count = totals.count
    if count < 2:
        raise ProblemError(f"a gradient noise scale needs at least two samples, but the problem has {count}")
    # Shares are gradients of single samples over N (mean loss) or as they are (sum loss): s cₙ is the sample's own loss.
    mean = float(wide(gradient_norms(problem)).square().sum()) * totals.scale**2 / count
    whole = float(wide(problem.gradient()).square().sum()) * (totals.scale / count) ** 2
    trace, square = count * (mean - whole) / (count - 1), (count * whole - mean) / (count - 1)
    return GradientNoise(
        method="exact",
        products=0,
        seconds=time.perf_counter() - begin,
        converged=True,
        partial=False,
        simple=trace / square if square > 0 else float("inf"),
        trace=trace,
        square=square,
    )
