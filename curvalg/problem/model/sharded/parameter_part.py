"""The part of a parameter that a process holds, and its place in the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorBlock:
    """A block of a parameter: what tensor parallelism leaves to a process, and all of it where there is none.

    Args:
        full: shape of the parameter.
        starts: where the block begins, along each axis.
        shape: of the block.
        copies: how many processes have the same block.
    """

    full: torch.Size
    starts: tuple[int, ...]
    shape: torch.Size
    copies: int = 1

    def runs(self, starts: Sequence[int], shape: Sequence[int]) -> list[tuple[int, int]]:
        """The places in the parameter, in flat order, of a smaller block in this one: (first, length) of each run."""
        if not math.prod(shape):
            return []
        strides = [math.prod(self.full[i + 1 :]) for i in range(len(self.full))]
        split = len(shape)  # axes from here on are taken whole, and those before it one by one
        while split and shape[split - 1] == self.full[split - 1]:
            split -= 1
        outer = range(max(0, split - 1))
        length = math.prod(shape[max(0, split - 1) :])
        first = sum((a + b) * stride for a, b, stride in zip(self.starts, starts, strides, strict=True))
        return [
            (first + sum(at * strides[axis] for axis, at in zip(outer, place, strict=True)), length)
            for place in itertools.product(*(range(shape[axis]) for axis in outer))
        ]


@dataclass(frozen=True)
class ParameterPart:
    """A part of one parameter: some of the slices along an axis, the same number on all processes as far as there are enough.

    Args:
        name: of the parameter.
        block: that is cut.
        axis: along which; None: the numbers in flat order are.
        ranks: the number of processes.
        rank: of this process.
        dtype: of the parameter.
    """

    name: str
    block: TensorBlock
    axis: int | None
    ranks: int
    rank: int
    dtype: torch.dtype

    @property
    def whole(self) -> torch.Size:
        """The shape of the block, which the model computes with."""
        return self.block.shape

    @property
    def summed(self) -> torch.dtype:
        """The dtype in which vectors and gradients are held and summed: never below float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def dtype_of(self, part: Tensor) -> torch.dtype:
        """The dtype of the whole that the model computes with, of parts as vectors are held: the parameter's own."""
        return self.dtype if part.dtype == self.summed else part.dtype

    @property
    def slices(self) -> int:
        """The number of slices along the axis."""
        return self.whole.numel() if self.axis is None else self.whole[self.axis]

    @property
    def each(self) -> int:
        """The numbers of one slice."""
        return self.whole.numel() // self.slices if self.slices else 0

    @property
    def most(self) -> int:
        """The most numbers that a process holds."""
        return -(-self.slices // self.ranks) * self.each

    def count(self, rank: int) -> int:
        """The numbers that a process holds."""
        return max(0, min(self.most, self.whole.numel() - rank * self.most))

    @property
    def shape(self) -> torch.Size:
        """The shape of this process's part."""
        own = self.count(self.rank)
        if self.axis is None:
            return torch.Size([own])
        return torch.Size([own // self.each if i == self.axis and self.each else n for i, n in enumerate(self.whole)])

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The places in the parameter, in flat order, of this process's numbers: (first, length) of each run of neighbours."""
        if self.axis is None:
            own = self.count(self.rank)
            return [(self.rank * self.most, own)] if own else []
        starts = [self.rank * self.most // (self.each or 1) if i == self.axis else 0 for i in range(len(self.whole))]
        return self.block.runs(starts, self.shape)

    def of(self, parameter: Tensor) -> Tensor:
        """This process's numbers of a parameter that it holds whole: a view."""
        at = self.rank * self.most
        return parameter.detach().view(-1)[at : at + self.count(self.rank)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole parameter of the numbers of all processes, one after the other."""
        flat = torch.cat([part[: self.count(rank)] for rank, part in enumerate(parts)])
        if self.axis is None:
            return flat.view(self.whole)
        moved = [self.whole[self.axis], *(n for i, n in enumerate(self.whole) if i != self.axis)]
        return flat.view(moved).movedim(0, self.axis)

    def cut(self, whole: Tensor) -> Sequence[Tensor]:
        """The numbers of each process, of a tensor like the whole parameter: views where it lies in memory in that order."""
        moved = whole if self.axis is None else whole.movedim(self.axis, 0)
        parts: Sequence[Tensor] = moved.reshape(-1).split([self.count(rank) for rank in range(self.ranks)])
        return parts

    def flat(self, part: Tensor) -> Tensor:
        """This process's part as its numbers in the order in which they travel."""
        moved = part if self.axis is None else part.movedim(self.axis, 0)
        return moved.reshape(-1)

    def unflat(self, numbers: Tensor) -> Tensor:
        """The part of this process of its numbers in the order in which they travel."""
        if self.axis is None:
            return numbers
        moved = [self.shape[self.axis], *(n for i, n in enumerate(self.shape) if i != self.axis)]
        return numbers.view(moved).movedim(0, self.axis)
