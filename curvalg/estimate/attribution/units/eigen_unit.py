"""A layer whose block is diagonal in a Kronecker product of two bases: inputs and deltas are changed into these instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvalg.estimate.attribution.units.layer_parts import HeldProducts, LayerPart
from curvalg.estimate.attribution.units.parameter_unit import ParameterUnit, Scores, selected
from curvalg.estimate.attribution.units.truncation import truncated
from curvalg.lowering.blocks.rows import RowRanges
from curvalg.lowering.matrices import KroneckerBasis, Spectral, Structure
from curvalg.problem.layers.kinds.affine import AffineLayer
from curvalg.problem.layers.kinds.maps import MatrixMap, WeightForm
from curvalg.problem.model.layer_record import FactorPairs, GuardedInput, LayerRecord, ParameterGroup

WEIGHT = "coordinates"


@dataclass(frozen=True)
class LayerSizes:
    """What the cost of a layer depends on.

    Args:
        positions: T.
        inputs: width of h, with the one of a bias.
        outputs: width of δ.
        columns: K.
    """

    positions: int
    inputs: int
    outputs: int
    columns: int

    @property
    def of_inputs_and_deltas(self) -> int:
        """Multiplications of a change of basis of the inputs and deltas of one row."""
        return self.positions * (self.inputs**2 + self.columns * self.outputs**2)

    @property
    def of_gradients(self) -> int:
        """Multiplications of a change of basis of the gradients of one row."""
        return self.columns * self.inputs * self.outputs * (self.inputs + self.outputs)


class EigenUnit(ParameterUnit[AffineLayer]):
    """Gradients in the eigenbasis Q_B ⊗ Q_A of a layer's block: Σₜ (Q_Bᵀδ)(Q_Aᵀh)ᵀ, of which A is an elementwise product.

    Args:
        record: of the layer, on any batch.
        output: Q_B (groups, out, out).
        inputs: Q_A (groups, in, in), where a bias is the last input.
        values: eigenvalues (groups, out, in).
    """

    def __init__(self, record: LayerRecord, output: Tensor, inputs: Tensor, values: Tensor) -> None:
        super().__init__(record.params, values.numel())
        self._output, self._inputs, self._values = output, inputs, values
        groups, out, width = values.shape
        self._form = WeightForm(torch.Size((groups * out, width)), groups)
        place = record.place
        self._place = ParameterGroup((WEIGHT,), place.name, place.module, {WEIGHT: self._form.shape})

    def view(self, records: Sequence[LayerRecord]) -> AffineLayer:
        (record,) = selected(records, self.names)
        pairs = record.factor_pairs()
        assert not isinstance(pairs, str)
        h, d = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in _stacked(pairs))
        width = h.shape[-1]
        inputs = h.flatten(1, 2) @ self._inputs[:, :width]
        if self._inputs.shape[1] > width:  # the one that a bias multiplies
            inputs += self._inputs[:, width:]
        deltas = (d.flatten(1, 3) @ self._output).reshape(d.shape)
        layer = MatrixMap(self._form, GuardedInput(inputs.reshape(*h.shape[:3], -1)))
        return AffineLayer(self._place, WEIGHT, None, layer, deltas)

    def gather(self, view: AffineLayer, rows: slice) -> Tensor:
        return view.explicit(rows)[WEIGHT].transpose(0, 1).flatten(0, 1)

    def multiply(self, gradients: Tensor) -> Tensor:
        return gradients * self._values.reshape(self._form.shape)

    def project(self, view: AffineLayer, products: Tensor, positions: bool = False) -> Scores:
        way = view.project_positions if positions else view.project
        return {view.name: way({WEIGHT: products})}

    def hold(self, products: Tensor, parts: Sequence[LayerPart[Any]], rank: int) -> list[HeldProducts]:
        # Factors are changed back, so that inputs and deltas of training samples need no change.
        return [truncated(products.reshape(-1, *self._values.shape), rank).changed(self._output, self._inputs)]

    def quadratic(self, view: AffineLayer, rows: int, columns: int) -> Tensor:
        h, d = view.inputs, view.deltas
        if h.shape[-2] > 1:
            return super().quadratic(view, rows, columns)
        groups = len(self._values)
        h, d = h.reshape(groups, rows, -1).square(), d.reshape(groups, columns, rows, -1).square()
        return ((h @ self._values.mT)[:, None] * d).sum((0, 3))

    def covariance(self, view: AffineLayer, rows: int, columns: int) -> Tensor:
        h, d = view.inputs, view.deltas
        if h.shape[-2] > 1:
            return super().covariance(view, rows, columns)
        groups = len(self._values)
        h, d = h.reshape(groups, rows, -1).square(), d.reshape(groups, columns, rows, -1).transpose(1, 2)
        return ((d * (h @ self._values.mT)[:, :, None]) @ d.mT).sum(0)


def eigen_unit(record: LayerRecord, structure: Structure, places: RowRanges) -> tuple[EigenUnit, LayerSizes] | None:
    """The unit of a layer on whose parameters a block is diagonal in its Kronecker bases; None where it is not.

    Args:
        record: of the layer, of exactly the parameters of the block.
        structure: the block.
        places: how it lies in the parameters.
    """
    pairs = record.factor_pairs()
    if isinstance(pairs, str) or not isinstance(structure, Spectral) or not isinstance(structure.basis, KroneckerBasis):
        return None
    first, basis = pairs[0], structure.basis
    if len(basis.factors) != 2 or len(structure.values) < structure.size:
        return None
    if any(pair.deltas.shape[1:3] != (record.columns, record.rows) for pair in pairs):
        return None  # several rows of the output are one row of inputs
    factors = [f if f.ndim == 3 else f[None] for f in basis.factors]
    values, order = structure.values.to(factors[0].dtype), basis.order
    output, inputs = reversed(factors) if (swapped := first.arrangement.inputs_first) else factors
    groups, out, width = sum(len(p.inputs) for p in pairs), first.deltas.shape[-1], first.inputs.shape[-1]
    width += (biased := first.bias in record.params)
    if output.shape != (groups, out, out) or inputs.shape != (groups, width, width):
        return None
    if swapped:
        values = values.reshape(width, out).T
    else:
        lying = [pair.arrangement.order(record.params, values.device) for pair in pairs]
        if not _lies_so(lying, order, bool(places.outputs), biased):
            return None
        values = values if order is None else values[order]
    unit = EigenUnit(record, output, inputs, values.reshape(groups, out, width).contiguous())
    return unit, LayerSizes(first.inputs.shape[2], width, out, record.columns)


def _lies_so(lying: list[Tensor | None], order: Tensor | None, joint: bool, biased: bool) -> bool:
    """Whether the products of a basis are in the order of a layer's own."""
    known = [numbers for numbers in lying if numbers is not None]
    if len(known) < len(lying):
        return len(lying) == 1 and order is None and joint == biased
    every = torch.cat(known)
    return not joint and torch.equal(every, torch.arange(len(every), device=every.device) if order is None else order)


def _stacked(pairs: list[FactorPairs]) -> tuple[list[Tensor], list[Tensor]]:
    return [pair.inputs for pair in pairs], [pair.deltas for pair in pairs]
