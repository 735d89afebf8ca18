"""A model in parts on processes that are not there: what would be gathered, without a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvalg.distributed.sharding.grid import ProcessGrid
from curvalg.errors import ProblemError
from curvalg.problem.model import parameters as params_
from curvalg.problem.model.model import Adapter
from curvalg.problem.model.sharded.gathering import ReshardUnit
from curvalg.problem.model.sharded.parameter_part import ParameterPart, TensorBlock
from curvalg.problem.model.sharded.sharded_model import ShardedModel
from curvalg.problem.model.sharded.whole_weights import WholeWeights
from curvalg.tensors.partial_tensors import is_part

RANKS = 2
"""Processes of a planned model: which unit is gathered when is the same for any number of them but one."""


@dataclass(frozen=True)
class PlannedGrid(ProcessGrid):
    """Processes that are not there, of which this is the first."""

    whole: Any = None
    data: Any = None
    tensor: Any = None
    ranks: tuple[tuple[int, ...], tuple[int, ...]] = (tuple(range(RANKS)), (0,))

    @property
    def rank(self) -> int:
        return 0


@dataclass
class CountedExchange:
    """Exchanges that only count: tensors of the right form come back, of no numbers.

    Attributes:
        gathers, scatters: the widths of the buffers of each process, in order.
    """

    gathers: list[int] = field(default_factory=list)
    scatters: list[int] = field(default_factory=list)

    def gathered(self, own: Tensor) -> Tensor:
        """Buffers like those of all processes, (ranks, n)."""
        self.gathers.append(own.numel())
        return own.new_empty(RANKS, *own.shape)

    def scattered(self, parts: Tensor) -> Tensor:
        """A buffer like the sum of the parts for this process, (n,)."""
        self.scatters.append(parts.shape[1])
        return parts.new_empty(parts.shape[1:])


class CountedUnit(ReshardUnit):
    """A unit that has an exchange of its own, so that its gathers are known from those of others."""

    def __init__(self, pieces: Sequence[ParameterPart]) -> None:
        super().__init__(pieces)
        self.counted = CountedExchange()

    def whole(self, exchange: Any, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return super().whole(self.counted, parts)

    def parts(self, exchange: Any, wholes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return super().parts(self.counted, wholes)


class PlannedWeights(WholeWeights):
    """Whole weights of tensors without numbers, whose memory is known by the object that stands for it."""

    def address(self, t: Tensor) -> int | None:
        return t.untyped_storage()._cdata if t.layout == torch.strided else None


class PlannedModel(ShardedModel):
    """A module cut over processes that are not there, to be called on tensors without numbers.

    Args:
        module: whole, or sharded by ``fully_shard``.
        params: names of the chosen parameters.
        rule: ``forward(model, batch)``.

    Raises:
        ProblemError: it is parallelised by ``parallelize_module``.
    """

    def __init__(self, module: nn.Module, params: params_.Selection, rule: Adapter | None) -> None:
        super().__init__(module, params, rule, PlannedGrid())
        units = [CountedUnit([self._piece_of(slot) for slot in some]) for some in self._members]
        spreads = [[None] * len(unit.pieces) for unit in units]
        self._weights = PlannedWeights(units, spreads, CountedExchange())
        self.units = [unit for unit in units if unit.pieces]
        """Those that have parameters: where fully_shard was called on all layers, nothing is left for the outermost module."""

    def _piece(self, name: str, parameter: Tensor) -> ParameterPart:
        shape, axis = parameter.shape, None
        if is_part(parameter):
            placements = list(parameter.placements)  # type: ignore[attr-defined]
            if len(placements) != 1 or not placements[0].is_shard():
                raise ProblemError(
                    f"a plan is of models that are whole or sharded by fully_shard over one dimension, but parameter {name!r} "
                    f"has the placements {tuple(placements)}; plan the model before it is parallelised"
                )
            axis = int(placements[0].dim)
        block = TensorBlock(shape, (0,) * len(shape), shape)
        return ParameterPart(name, block, axis, RANKS, 0, parameter.dtype)

    def part(self, parameter: Tensor) -> Tensor:
        known = self._views.get(id(parameter))
        if known is None:
            piece = self._pieces[id(parameter)]
            form = torch.empty(piece.shape, dtype=parameter.dtype, device="meta")
            self._views[id(parameter)] = known = parameter, 0, form
        return known[2]

    def _select(self, params: params_.Selection) -> dict[str, Tensor]:
        return {name: self.part(p) for name, p in params_.selected(self.module, params).items()}
