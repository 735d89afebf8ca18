"""Weights that come together before use, differentiable any number of times.

Gathering the parts of a tensor and summing a tensor over processes and cutting it are each other's transpose. Written as each
other's derivative they stay in the graph, however often it is differentiated; hooks that communicate outside of it do not.
Source: Rajbhandari et al., ZeRO, SC 2020, for the data flow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from curvalg.problem.model.sharded.parameter_part import ParameterPart


class Exchange(Protocol):
    """What units need of the processes that hold the other parts."""

    def gathered(self, own: Tensor) -> Tensor:
        """The buffers (n,) of all processes, (ranks, n)."""

    def scattered(self, parts: Tensor) -> Tensor:
        """The sum over processes of what each has for this one, (n,) of (ranks, n)."""


class ReshardUnit:
    """Parameters that are whole together, by one exchange.

    Args:
        pieces: of the parameters.
    """

    def __init__(self, pieces: Sequence[ParameterPart]) -> None:
        self.pieces = tuple(pieces)
        self._width = sum(piece.most for piece in pieces)
        self._offsets = [sum(piece.most for piece in pieces[:i]) for i in range(len(pieces))]

    @property
    def cut(self) -> bool:
        """Whether there are other processes with parts of them."""
        return any(piece.ranks > 1 for piece in self.pieces)

    @property
    def numbers(self) -> int:
        """The numbers of all its parameters together."""
        return sum(piece.whole.numel() for piece in self.pieces)

    def whole(self, exchange: Exchange, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All parameters whole, of the parts of this process."""
        dtypes = [piece.dtype_of(part) for piece, part in zip(self.pieces, parts, strict=True)]
        own = parts[0].new_zeros(self._width, dtype=_widest(dtypes))
        for piece, part, at in zip(self.pieces, parts, self._offsets, strict=True):
            own[at : at + part.numel()] = piece.flat(part)
        every = exchange.gathered(own)
        return tuple(
            piece.joined([row[at : at + piece.most] for row in every]).to(dtype)
            for piece, dtype, at in zip(self.pieces, dtypes, self._offsets, strict=True)
        )

    def parts(self, exchange: Exchange, wholes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The parts of this process of the sum over processes of tensors like the whole parameters."""
        ranks = self.pieces[0].ranks
        dtypes = [torch.promote_types(whole.dtype, torch.float32) for whole in wholes]
        buffer = wholes[0].new_zeros(ranks, self._width, dtype=_widest(dtypes))
        for piece, whole, at in zip(self.pieces, wholes, self._offsets, strict=True):
            for row, part in zip(buffer, piece.cut(whole), strict=True):
                row[at : at + part.numel()] = part
        own = exchange.scattered(buffer)
        return tuple(
            piece.unflat(own[at : at + piece.count(piece.rank)]).to(dtype)
            for piece, dtype, at in zip(self.pieces, dtypes, self._offsets, strict=True)
        )


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """A dtype that holds the numbers of all."""
    return reduce(torch.promote_types, dtypes)


class Gather(torch.autograd.Function):
    """Parts to whole parameters; the derivative sums over processes and cuts."""

    @staticmethod
    def forward(ctx: Any, unit: ReshardUnit, exchange: Exchange, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.unit, ctx.exchange = unit, exchange
        return unit.whole(exchange, parts)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return None, None, *ReduceScatter.apply(ctx.unit, ctx.exchange, *cotangents)


class ReduceScatter(torch.autograd.Function):
    """Tensors like whole parameters, summed over processes, to parts; the derivative gathers."""

    @staticmethod
    def forward(ctx: Any, unit: ReshardUnit, exchange: Exchange, *wholes: Tensor) -> tuple[Tensor, ...]:
        ctx.unit, ctx.exchange = unit, exchange
        return unit.parts(exchange, wholes)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return None, None, *Gather.apply(ctx.unit, ctx.exchange, *cotangents)
