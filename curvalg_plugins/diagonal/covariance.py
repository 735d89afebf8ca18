"""The diagonals of the gradient covariance: second moments and variances of the gradients of single samples."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from curvalg import Diagonal, Expr
from curvalg_plugins.diagonal.squares import SquaredColumns

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import Batch, Layout


@dataclass(frozen=True)
class CovarianceDiagonal(SquaredColumns):
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

    name: ClassVar[str] = "covariance_diagonal"
    symbol: ClassVar[str] = r"\operatorname{diag} U"

    def columns(self, batch: Batch) -> Tensor:
        return batch.gradient_columns()


@dataclass(frozen=True)
class CenteredCovarianceDiagonal(SquaredColumns):
    """Variance of the gradients of single samples, s Σₙ (∇cₙ)² − (s/N) (∇L)² entry by entry (D × D).

    The diagonal of ``centered_covariance``: for an unweighted mean loss the biased variance, N⁻¹ Σₙ (gₙ − ḡ)² with the
    gradients gₙ of the unweighted losses; times N/(N−1) it is unbiased. Used for signal-to-noise ratios of gradients and to
    choose batch sizes (Balles et al., UAI 2017).

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> X, y = torch.randn(6, 3), torch.randn(6, 1)
    >>> net = torch.nn.Linear(3, 1, bias=False)
    >>> op = registry.build("centered_covariance_diagonal").lower(Problem(net, torch.nn.MSELoss(), (X, y)))
    >>> g = 2 * (net(X) - y) * X
    >>> torch.allclose(op @ torch.ones(3), g.var(0, correction=0), rtol=1e-3)
    True
    """

    name: ClassVar[str] = "centered_covariance_diagonal"
    symbol: ClassVar[str] = r"\operatorname{diag} \bar U"

    def columns(self, batch: Batch) -> Tensor:
        return batch.gradient_columns()

    def accumulate(self, batch: Batch, prepared: None = None) -> dict[str, Any]:
        squares: dict[str, Tensor] = {}
        means: dict[str, Tensor] = {}
        for record in self.records(batch):
            ones = batch.output.new_full((1, record.columns, record.rows), 1 / math.sqrt(batch.count))
            for total, found in (squares, record.squares()), (means, record.combine(ones)):
                for name, value in found.items():
                    total[name] = value if name not in total else total[name] + value
        return {"squares": squares, "means": {name: value[0] for name, value in means.items()}}

    def of_layers(self, stats: dict[str, Any], names: Set[str]) -> dict[str, Any]:
        return {kind: super(CenteredCovarianceDiagonal, self).of_layers(found, names) for kind, found in stats.items()}

    def finish(self, stats: dict[str, Any], layout: Layout, prepared: None = None) -> Expr:
        squares, means = layout.flatten(stats["squares"]), layout.flatten(stats["means"])
        return Diagonal((squares - means.square()).clamp_min(0))  # a variance, up to rounding
