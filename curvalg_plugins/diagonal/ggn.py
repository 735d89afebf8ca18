"""The diagonal of the Gauss-Newton matrix, exact or from Monte-Carlo draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from curvalg import OptionError
from curvalg_plugins.diagonal.squares import SquaredColumns

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import Batch


@dataclass(frozen=True)
class GGNDiagonal(SquaredColumns):
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

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("seed", self.seed)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise OptionError(f"ggn_diagonal: {name} is an integer ≥ 0, got {value!r}")

    @property
    def numbered(self) -> bool:  # type: ignore[override]
        """Whether draws depend on the running number of their sample."""
        return self.samples > 0

    def columns(self, batch: Batch) -> Tensor:
        if self.samples:
            return batch.per_sample_columns(batch.pseudo_gradients(self.samples, seed=self.seed))
        return batch.row_factor()
