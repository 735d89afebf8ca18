"""Gradients of a batch for a layer's parameters: of weights as matrices of low rank, of vectors as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from curvalg.errors import OptionError
from curvalg.estimate.attribution.units.truncation import LowRankMatrices, norms, truncated
from curvalg.problem.model.layer_record import FactorPairs, LayerRecord, steps

Held = TypeVar("Held", bound="HeldProducts")
SAFE = 16
"""Units of rounding that norms of sums over positions are enlarged by, so that they are bounds."""


class HeldProducts(Protocol):
    """What is held of some directions of a layer's parameters."""

    @property
    def discarded(self) -> Tensor | None:
        """Norms of what is missing (P,); None where nothing can be."""
        ...

    def and_(self, other: Any) -> HeldProducts:
        """These and others."""
        ...


@dataclass(frozen=True)
class WholeVectors:
    """Directions as they are.

    Args:
        vectors: by parameter, (P, *parameter.shape).
    """

    vectors: dict[str, Tensor]
    discarded: ClassVar[None] = None

    def and_(self, other: WholeVectors) -> WholeVectors:
        """These and others."""
        return WholeVectors({name: torch.cat([v, other.vectors[name]]) for name, v in self.vectors.items()})


class LayerPart(ABC, Generic[Held]):
    """Gradients of a layer's parameters, and inner products with directions that are held in few numbers.

    Args:
        name: of the layer.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def hold(self, directions: Mapping[str, Tensor], rank: int) -> Held:
        """What is held of directions by parameter, (P, *parameter.shape)."""

    @abstractmethod
    def project(self, held: Held, positions: bool) -> Tensor:
        """Inner products (P, K, n), or the shares of positions in these, (P, K, n, T)."""

    @abstractmethod
    def norms(self, positions: bool) -> Tensor | None:
        """Bounds of the norms of the gradients, exact but for rounding: (K, n), or (K, n, T). None for a part that holds
        everything."""


class VectorPart(LayerPart[WholeVectors]):
    """Parameters that are vectors, whose directions are small as they are.

    Args:
        record: of the layer.
    """

    def __init__(self, record: LayerRecord) -> None:
        super().__init__(record.name)
        self._record = record

    def hold(self, directions: Mapping[str, Tensor], rank: int) -> WholeVectors:
        return WholeVectors({name: directions[name].clone() for name in self._record.params})

    def project(self, held: WholeVectors, positions: bool) -> Tensor:
        return (self._record.project_positions if positions else self._record.project)(held.vectors)

    def norms(self, positions: bool) -> None:
        return None


class MatrixPart(LayerPart[LowRankMatrices]):
    """A weight that is one matrix for each group of inputs, with its bias as a last input: gradients Σₜ δₜ hₜᵀ.

    Args:
        record: of the layer.
        pairs: inputs and deltas of its parts, of one size.
    """

    def __init__(self, record: LayerRecord, pairs: Sequence[FactorPairs]) -> None:
        super().__init__(record.name)
        self._names, self._arrangements = record.params, [pair.arrangement for pair in pairs]
        self._weight, self._bias = pairs[0].weight, pairs[0].bias if pairs[0].bias in record.params else None
        inputs = torch.cat([pair.inputs for pair in pairs]) if len(pairs) > 1 else pairs[0].inputs
        self._deltas = torch.cat([pair.deltas for pair in pairs]) if len(pairs) > 1 else pairs[0].deltas
        self._inputs = inputs if self._bias is None else torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)

    def hold(self, directions: Mapping[str, Tensor], rank: int) -> LowRankMatrices:
        orders = [lying.order(self._names, self._deltas.device) for lying in self._arrangements]
        width, out, count = self._inputs.shape[-1], self._deltas.shape[-1], len(directions[self._weight])
        known = [order for order in orders if order is not None]
        if len(known) < len(orders):
            weight = directions[self._weight].reshape(count, len(self._deltas), out, -1)
            shift = [] if self._bias is None else [directions[self._bias].reshape(*weight.shape[:3], 1)]
            return truncated(torch.cat([weight, *shift], 3), rank)
        flat = torch.cat([directions[name].reshape(count, -1) for name in self._names], 1)
        return truncated(flat[:, torch.cat(known)].reshape(count, len(self._deltas), out, width), rank)

    def project(self, held: LowRankMatrices, positions: bool) -> Tensor:
        h, d = self._inputs, self._deltas
        groups, columns, rows, places, _ = d.shape
        count, rank = held.left.shape[0], held.left.shape[-1]
        result = d.new_zeros((count, columns, rows, places) if positions else (count, columns, rows))
        for p in steps(count, groups * rows * places * rank * (columns + 1), d.dtype):
            # One column for each direction and rank: (groups, out or in, directions · r).
            left, right = (t[p].permute(1, 2, 0, 3).flatten(2) for t in (held.left, held.right))
            inputs = (h.flatten(1, 2) @ right).reshape(groups, 1, rows, places, -1, rank)
            shares = (d.flatten(1, 3) @ left).reshape(groups, columns, rows, places, -1, rank).mul_(inputs).sum((0, -1))
            result[p] = shares.permute(3, 0, 1, 2) if positions else shares.sum(2).permute(2, 0, 1)
        return result

    def norms(self, positions: bool) -> Tensor:
        h, d = self._inputs, self._deltas
        each = norms(d, -1) * norms(h, -1)[:, None]  # (groups, K, n, T)
        if positions or h.shape[2] == 1:
            found = norms(each, 0)
            return found if positions else found[..., 0]
        groups, columns, rows, places, out = d.shape
        bounds = d.new_zeros(columns, rows)
        pairwise = places * (h.shape[-1] + out) < h.shape[-1] * out
        for n in steps(rows, groups * columns * max(places**2, h.shape[-1] * out), d.dtype):
            size = norms(each[:, :, n].sum(3), 0)  # which bounds them, too
            deltas = d[:, :, n] / torch.where(size > 0, size, torch.ones_like(size))[:, :, None, None]
            inputs, rounding = h[:, None, n], SAFE * torch.finfo(d.dtype).eps
            if pairwise:
                squares = ((inputs @ inputs.mT) * (deltas @ deltas.mT)).sum((0, 3, 4))
            else:
                squares = (deltas.mT @ inputs).square_().sum((0, 3, 4))
            bounds[:, n] = size * (squares.clamp(min=0) + rounding).sqrt()
        return bounds


def layer_part(record: LayerRecord) -> LayerPart[Any]:
    """How directions of a layer's parameters are held in few numbers.

    Raises:
        OptionError: its weight is no matrix.
    """
    pairs = record.factor_pairs()
    if not isinstance(pairs, str):
        if any(pair.deltas.shape[1:3] != (record.columns, record.rows) for pair in pairs):
            pairs = "several rows of the output are one row of its inputs"
        elif _numbers(pairs, record) != sum(record.shapes[name].numel() for name in record.params):
            pairs = "only some of its numbers are used"
    if not isinstance(pairs, str):
        return MatrixPart(record, pairs)
    if all(sum(size > 1 for size in record.shapes[name]) <= 1 for name in record.params):
        return VectorPart(record)
    raise OptionError(
        f"query_rank= is for layers whose weights are matrices, but of {', '.join(record.params)}: {pairs}; choose other "
        "parameters with Problem(params=...), or leave query_rank out"
    )


def _numbers(pairs: Sequence[FactorPairs], record: LayerRecord) -> int:
    """How many numbers of its parameters the matrices of a layer are."""
    return sum(
        len(pair.inputs) * pair.deltas.shape[-1] * (pair.inputs.shape[-1] + (pair.bias in record.params))
        for pair in pairs
    )
