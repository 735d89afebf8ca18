"""Where the numbers of vectors over sharded parameters lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from curvalg.problem.model.parameters import Layout
from curvalg.problem.model.sharded.parameter_part import ParameterPart
from curvalg.tensors.spaces.sharded_space import Exchanger, ShardedSpace


class ShardedLayout(Layout):
    """Names, shapes and flat positions of this process's parts of the chosen parameters.

    Attributes:
        whole: the layout of the whole parameters, as one process has it.

    Args:
        pieces: name -> the part of this process.
    """

    def __init__(self, pieces: Mapping[str, ParameterPart]) -> None:
        super().__init__({name: _form(piece.shape, piece.summed) for name, piece in pieces.items()})
        self.whole = Layout({name: _form(piece.block.full, piece.summed) for name, piece in pieces.items()})
        self._pieces = dict(pieces)
        self._space: ShardedSpace | None = None

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The places in a whole vector of the numbers of this process's part, in its order: (first, length) of each run."""
        return [
            (self.whole.slices[name].start + first, length)
            for name, piece in self._pieces.items()
            for first, length in piece.runs
        ]

    @property
    def copies(self) -> torch.Tensor | None:
        """For each number of this process's part how many processes hold it, float64; None where every one is held once."""
        if all(piece.block.copies == 1 for piece in self._pieces.values()):
            return None
        pieces = self._pieces.values()
        counts = torch.tensor([float(piece.block.copies) for piece in pieces], dtype=torch.float64, device="cpu")
        return counts.repeat_interleave(torch.tensor([piece.shape.numel() for piece in pieces], device="cpu"))

    def space(self, exchanger: Exchanger) -> ShardedSpace:
        if self._space is None:
            copies = self.copies
            self._space = ShardedSpace(self.whole.size, self.runs, exchanger, None if copies is None else 1 / copies)
        return self._space

    def places(self) -> torch.Tensor:
        return _joined(self.runs)

    def places_in(self, name: str) -> torch.Tensor:
        return _joined(self._pieces[name].runs)

    def once(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if (copies := self.copies) is None else rows / copies.to(rows)

    def __repr__(self) -> str:
        return f"ShardedLayout({self.size} of {self.whole.size} parameters in {len(self.shapes)} tensors, {self.dtype})"


def whole_layout(layout: Layout) -> Layout:
    """The layout of the whole parameters."""
    return layout.whole if isinstance(layout, ShardedLayout) else layout


def _joined(runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The places that runs (first, length) consist of."""
    return torch.cat([torch.arange(first, first + length, device="cpu") for first, length in (*runs, (0, 0))])


def _form(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
