"""Where the numbers of vectors over sharded parameters lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from curvalg.errors import VectorError
from curvalg.problem.model.parameters import Layout
from curvalg.problem.model.sharded.full_vectors import put_together
from curvalg.problem.model.sharded.parameter_part import ParameterPart
from curvalg.tensors.partial_tensors import is_part
from curvalg.tensors.spaces.sharded_space import Exchanger, ShardedSpace


class ShardedLayout(Layout):
    """Names, shapes and flat positions of this process's parts of the chosen parameters.

    Args:
        pieces: name -> the part of this process.
        foremost: whether this process is the first one of those that have the same data, and so the same numbers of parameters
            that are not cut among them.
        exchanger: of all processes; None: not known yet.
    """

    def __init__(
        self, pieces: Mapping[str, ParameterPart], foremost: bool = True, exchanger: Exchanger | None = None
    ) -> None:
        super().__init__({name: _form(piece.shape, piece.summed) for name, piece in pieces.items()})
        self._whole = Layout({name: _form(piece.block.full, piece.summed) for name, piece in pieces.items()})
        self._pieces = dict(pieces)
        self._foremost, self._exchanger = foremost, exchanger
        self._space: ShardedSpace | None = None

    @property
    def whole(self) -> Layout:
        return self._whole

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

    def flatten(
        self, tree: Mapping[str, torch.Tensor] | Sequence[torch.Tensor], *, leading: bool = False
    ) -> torch.Tensor:
        if leading:
            return super().flatten(tree, leading=True)
        parts = [self._part_of(name, t) for name, t in zip(self.names, self._ordered(tree), strict=True)]
        return super().flatten(parts)

    def _part_of(self, name: str, tensor: Any) -> torch.Tensor:
        """This process's part of a DTensor that is cut as its parameter is; any other tensor as it is."""
        full, shape = self.whole.shapes[name], self.shapes[name]
        if is_part(tensor):
            if any(placement.is_partial() for placement in tensor.placements):
                raise VectorError(
                    f"{name}: expected a DTensor that is cut as the parameter is, got {tuple(tensor.placements)}, of which the "
                    "sum is still to be taken; redistribute it as the parameter is"
                )
            with torch.no_grad():
                part: torch.Tensor = tensor.to_local()
            if tensor.shape[: len(full)] == full and part.shape[: len(shape)] == shape:
                return part
            came = f"a DTensor of shape {tuple(tensor.shape)} with placements {tuple(tensor.placements)}"
        elif full != shape and tensor.shape[: len(full)] == full:
            came = f"a whole tensor of shape {tuple(tensor.shape)}"
        else:
            return tensor  # type: ignore[no-any-return]
        raise VectorError(
            f"{name}: expected the part of this process, of shape {tuple(shape)} of {tuple(full)}, or a DTensor that is cut as "
            f"the parameter is; got {came}. Of a whole vector v the part is v[problem.layout.places()]"
        )

    def full(self, vector: torch.Tensor) -> torch.Tensor | None:
        exchanger = self._exchanger
        assert exchanger is not None  # a problem joins its model to its processes at once
        with exchanger.together("a whole vector of its parts"):
            self._require_vector(vector)
            return put_together(vector, self._own_places(), self.whole.size, exchanger)

    def _own_places(self) -> torch.Tensor:
        """The places of this process's numbers, with -1 for those that another one hands in as well."""
        copies, places = self.copies, self.places()
        return places if copies is None or self._foremost else places.masked_fill(copies > 1, -1)

    def once(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if (copies := self.copies) is None else rows / copies.to(rows)

    def __repr__(self) -> str:
        return f"ShardedLayout({self.size} of {self.whole.size} parameters in {len(self.shapes)} tensors, {self.dtype})"


def _joined(runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The places that runs (first, length) consist of."""
    return torch.cat([torch.arange(first, first + length, device="cpu") for first, length in (*runs, (0, 0))])


def _form(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
