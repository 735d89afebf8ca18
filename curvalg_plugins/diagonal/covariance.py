"""The diagonal of the uncentred gradient covariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from curvalg import Diagonal, Expr, Facts, LossFacts, MatrixTerm

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import Batch, Layout


@dataclass(frozen=True)
class CovarianceDiagonal(MatrixTerm):
    """Diagonal of the gradient covariance, s Σₙ (∇cₙ)² entry by entry (D × D).

    s = N for a mean loss, 1 for a sum; cₙ is the share of sample n in the loss. Used as a cheap preconditioner and in
    pruning and continual learning (Kirkpatrick et al., PNAS 2017).

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> data = (torch.randn(6, 3), torch.randn(6, 1))
    >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), data)
    >>> op = registry.build("covariance_diagonal").lower(problem)
    >>> exact = registry.build("covariance").lower(problem).to_dense().diagonal()
    >>> torch.allclose(op @ torch.ones(4), exact, rtol=1e-4)
    True
    """

    symbol: ClassVar[str] = r"\operatorname{diag} U"

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(psd=True)

    def accumulate(self, batch: Batch, prepared: None = None) -> dict[str, Tensor]:
        return {name: batch.scale * g.square().sum(0) for name, g in batch.per_sample_gradients().items()}

    def finish(self, stats: dict[str, Tensor], layout: Layout, prepared: None = None) -> Expr:
        return Diagonal(layout.flatten(stats))
