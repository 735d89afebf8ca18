"""Eigenvalues of curvature, by the parameters that they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from curvalg import CurvatureOperator, ExpressionError, MatrixBlock


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a block of curvature, or of several.

    Args:
        params: names of the parameters of the block.
        values: eigenvalues, float64.
        zeros: how many more there are that are zero.
    """

    params: tuple[str, ...]
    values: Tensor
    zeros: int

    @property
    def size(self) -> int:
        """The number of all eigenvalues."""
        return len(self.values) + self.zeros

    def determined(self, scale: float, prior: float) -> float:
        """The number γ = Σ βλ / (βλ + δ) of directions that data of curvature βλ determine better than a prior δ."""
        scaled = scale * self.values
        return float((scaled / (scaled + prior)).sum())

    def log_determinant(self, scale: float, prior: float) -> float:
        """The number Σ log(βλ + δ); NaN where one of them is negative."""
        rest = self.zeros * math.log(prior)
        return float((scale * self.values + prior).log().sum()) + rest


def spectra(op: CurvatureOperator) -> list[Spectrum] | None:
    """The eigenvalues of all blocks of a symmetric matrix; None where structure does not give them.

    Args:
        op: on all parameters of its problem.
    """
    names = tuple(op.problem.layout.names)
    try:
        blocks: Sequence[MatrixBlock] = op.structure
    except ExpressionError:
        pairs = op.exact("eigh")
        if pairs is None:
            return None
        rest = pairs.eigenvalues.new_full((pairs.multiplicity if pairs.rest else 0,), pairs.rest)
        return [Spectrum(names, torch.cat([pairs.eigenvalues, rest]).cpu(), 0 if pairs.rest else pairs.multiplicity)]
    psd = bool(op.facts.psd)
    return [_of_block(block, psd) for block in blocks]


def _of_block(block: MatrixBlock, psd: bool) -> Spectrum:
    values = block.scale * _values(block).double().cpu() + block.shift
    if psd:  # rounding may make zeros negative
        values = values.clamp_min(0)
    return Spectrum(block.params, values, 0)


def _values(block: MatrixBlock) -> Tensor:
    """The eigenvalues of M of a block, scale · M + shift · I."""
    if block.kind == "kronecker":
        each = [torch.linalg.eigvalsh(((f + f.mT) / 2).double()) for f in block.factors]
        products: Tensor = reduce(lambda a, b: (a[..., :, None] * b[..., None, :]).flatten(-2), each)
        return products.reshape(-1)
    if block.values is not None:
        rest = block.values.new_full((block.size - len(block.values),), block.rest)
        return torch.cat([block.values, rest])
    if block.kind == "low_rank":
        left, core, _ = (f.double() for f in block.factors)
        triangle = torch.linalg.qr(left).R
        inner = torch.linalg.eigvalsh(triangle @ (core + core.T) @ triangle.T / 2)
        return torch.cat([inner, inner.new_zeros(block.size - len(inner))])
    (matrix,) = block.factors
    values: Tensor = torch.linalg.eigvalsh(((matrix + matrix.T) / 2).double())
    return values


def within(blocks: Iterable[Spectrum], groups: Sequence[tuple[str, ...]]) -> list[Spectrum] | None:
    """The eigenvalues of each group of parameters; None where a block reaches over several groups."""
    owner = {name: i for i, names in enumerate(groups) for name in names}
    found: list[list[Spectrum]] = [[] for _ in groups]
    for block in blocks:
        owners = {owner[name] for name in block.params}
        if len(owners) > 1:
            return None
        found[owners.pop()].append(block)
    return [
        Spectrum(tuple(names), torch.cat([block.values for block in mine]), sum(block.zeros for block in mine))
        for names, mine in zip(groups, found, strict=True)
    ]
