"""Covariances of outputs through the kernel between their gradients and the columns of the training data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvalg.estimate.attribution.units.parameter_unit import FlatUnit
from curvalg.lowering import CurvatureOperator
from curvalg.lowering.inverses.solver_kinds.structured import Prepared
from curvalg.lowering.low_rank import Factor
from curvalg.lowering.low_rank.gram import Gram
from curvalg.problem.layers.kinds.affine import AffineLayer
from curvalg.problem.model.layer_record import LayerRecord


class GramVariance:
    """The forms s gᵀ (W Wᵀ + c I)⁻¹ g' = s c⁻¹ (gᵀg' − (Wᵀg)ᵀ (WᵀW + c I)⁻¹ Wᵀg'), by inner products of gradients.

    The columns of W come from layer inputs and deltas of the training samples, where these are kept.

    Args:
        gram: W Wᵀ + c I.
        scale: s.
    """

    def __init__(self, gram: Gram, scale: float) -> None:
        self._gram, self._scale = gram, scale

    @classmethod
    def of(cls, op: CurvatureOperator) -> GramVariance | None:
        """The form of an operator; None where it is not an inverse by a Gram matrix that has proved itself."""
        op.prepare()
        if op.shape[0] != op.problem.size or not isinstance(node := op._scaled_inverse(), tuple):
            return None
        scale, inverse = node
        with op.problem.differentiating(), op.problem.lock:
            state = inverse._state(op.snapshot)
            if not isinstance(state, Prepared) or not isinstance(gram := state.structure, Gram):
                return None
            if not inverse.solver.trusts(state) or gram.shift <= 0:
                return None
            columns = gram.columns
            columns.factor.prepare(columns.problem, columns.snapshot)
            # Columns of other processes are not at hand.
            here = isinstance(columns.factor, Factor) and columns.factor.complete
            return cls(gram, scale) if here else None

    def covariance(self, records: Sequence[LayerRecord]) -> Tensor | None:
        """The forms of all pairs of gradients of a row, (n, K, K); None where layers are used in another way."""
        inner = self._inner(records)
        if inner is None:
            return None
        rows, columns = records[0].rows, records[0].columns
        solved = self._gram.solve_inner(inner)
        left, right = (t.reshape(-1, rows, columns).permute(1, 2, 0) for t in (inner, solved))
        plain = torch.stack([_by_itself(record) for record in records]).sum(0)
        return (plain - (left.to(right.dtype) @ right.mT).to(plain.dtype)) * (self._scale / self._gram.shift)

    def _inner(self, records: Sequence[LayerRecord]) -> Tensor | None:
        """The inner products Wᵀ g (M, n · K), the gradients of a row after each other."""
        factor, parts = self._gram.columns.factor, []
        assert isinstance(factor, Factor)
        for chunk in factor.chunks:
            theirs = {record.params: record for record in chunk.records}
            if theirs.keys() != {record.params for record in records}:
                return None
            products = torch.stack([record.gram(theirs[record.params]) for record in records]).sum(0)
            parts.append(products.permute(2, 3, 1, 0).flatten(2).flatten(0, 1))
        return self._gram.columns.transform(torch.cat(parts))


def _by_itself(record: LayerRecord) -> Tensor:
    """The inner products of all pairs of gradients of a row, (n, K, K)."""
    if not isinstance(record, AffineLayer) or record.inputs.shape[-2] > 1:
        plain = FlatUnit({name: record.shapes[name] for name in record.params}, lambda x: x)
        return plain.covariance(plain.view([record]), record.rows, record.columns)
    h = record.inputs.reshape(-1, record.rows, record.inputs.shape[-1])
    d = record.deltas.reshape(len(h), record.columns, record.rows, -1).transpose(1, 2)
    norms = (h.square().sum(2) + (record.bias in record.params))[:, :, None, None]
    return (norms * (d @ d.mT)).sum(0)
