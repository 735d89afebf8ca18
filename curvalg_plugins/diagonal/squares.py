"""Sums of squared gradients from layer inputs and output deltas, without a gradient per sample."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING, Any, ClassVar

from curvalg import Diagonal, Expr, Facts, LossFacts, MatrixTerm

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import Batch, LayerRecord, Layout

WIDTH = 32
"""Columns that are taken through the network at a time."""


class SquaredColumns(MatrixTerm):
    """The sum Σₙ Σₖ (Jₙᵀ sₖₙ)² entry by entry, as a diagonal matrix."""

    uses_layers: ClassVar[bool] = True

    @abstractmethod
    def columns(self, batch: Batch) -> Tensor:
        """The columns s, shape (columns, *output.shape)."""

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(psd=True)

    def records(self, batch: Batch) -> Iterator[LayerRecord]:
        """The layers, some columns at a time."""
        columns = self.columns(batch)
        for at in range(0, len(columns), WIDTH):
            yield from batch.layers(columns[at : at + WIDTH])

    def accumulate(self, batch: Batch, prepared: None = None) -> dict[str, Any]:
        total: dict[str, Tensor] = {}
        for record in self.records(batch):
            for name, squares in record.squares().items():
                total[name] = squares if name not in total else total[name] + squares
        return total

    def of_layers(self, stats: dict[str, Any], names: Set[str]) -> dict[str, Any]:
        return {name: value for name, value in stats.items() if name in names}

    def finish(self, stats: dict[str, Any], layout: Layout, prepared: None = None) -> Expr:
        return Diagonal(layout.flatten(stats))
