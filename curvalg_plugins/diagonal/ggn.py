"""The diagonal of the Gauss-Newton matrix, exact or from Monte-Carlo draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from curvalg import Diagonal, Expr, ExpressionError, Facts, LossFacts, MatrixTerm

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import Batch, Layout

WIDTH = 32
"""Columns of the loss Hessian's square root that are taken through the network at a time."""


@dataclass(frozen=True)
class GGNDiagonal(MatrixTerm):
    """Diagonal of the GGN, Σₙ Σₖ (Jₙᵀ sₖₙ)² entry by entry (D × D), with the columns Σₖ sₖₙ sₖₙᵀ = Bₙ.

    From layer inputs h and output deltas δ: for a linear layer Σₙ (Σₖ δₖₙ²) (hₙ²)ᵀ, without a gradient per sample. Used as a
    cheap preconditioner, in pruning and in Laplace approximations (Becker and LeCun, 1989; Ritter et al., ICLR 2018).

    Args:
        samples: 0 for the exact diagonal; otherwise so many draws per sample, of expectation the exact one.
        seed: of the draws.

    Raises:
        ExpressionError: samples or seed below zero.
        LossError: a loss that is not convex in the output has no exact columns.

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> data = (torch.randn(6, 3), torch.tensor([0, 1, 1, 0, 1, 0]))
    >>> problem = Problem(torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(), data)
    >>> op = registry.build("ggn_diagonal").lower(problem)
    >>> exact = registry.build("ggn").lower(problem).to_dense().diagonal()
    >>> torch.allclose(op @ torch.ones(8), exact, rtol=1e-4)
    True
    """

    samples: int = 0
    seed: int = 0
    name: ClassVar[str] = "ggn_diagonal"
    symbol: ClassVar[str] = r"\operatorname{diag} G"
    uses_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("seed", self.seed)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ExpressionError(f"ggn_diagonal: {name} is an integer ≥ 0, got {value!r}")

    @property
    def numbered(self) -> bool:  # type: ignore[override]
        """Draws are told apart by the running number of their sample."""
        return self.samples > 0

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(psd=True)

    def accumulate(self, batch: Batch, prepared: None = None) -> dict[str, Tensor]:
        if self.samples:
            columns = batch.per_sample_columns(batch.pseudo_gradients(self.samples, seed=self.seed))
        else:
            columns = batch.row_factor()
        total: dict[str, Tensor] = {}
        for at in range(0, len(columns), WIDTH):
            for record in batch.layers(columns[at : at + WIDTH]):
                for name, squares in record.squares().items():
                    total[name] = squares if name not in total else total[name] + squares
        return total

    def finish(self, stats: dict[str, Tensor], layout: Layout, prepared: None = None) -> Expr:
        return Diagonal(layout.flatten(stats))
