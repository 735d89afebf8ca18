"""Draws from normal distributions whose covariance is made of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvalg import CurvatureOperator, ExpressionError, MatrixBlock

Spread = Callable[[Tensor], Tensor]
"""Standard normal numbers (n, D) -> numbers with a covariance (n, D)."""


def spread_by_blocks(covariance: CurvatureOperator) -> Spread | None:
    """A function Q Λ^{1/2} of standard normal numbers, block by block; None where arrays do not give it.

    It is no symmetric root, and takes one change of basis where that takes two.

    Args:
        covariance: on all parameters of its problem.
    """
    try:
        blocks = covariance.structure
    except ExpressionError:
        return None
    parts = [(block.rows, _of_block(block)) for block in blocks]
    known: Sequence[tuple[Tensor, Spread]] = [(rows, part) for rows, part in parts if part is not None]
    if len(known) < len(parts):
        return None

    def spread(noise: Tensor) -> Tensor:
        result = torch.empty_like(noise)
        for rows, part in known:
            result[:, rows] = part(noise[:, rows])
        return result

    return spread


def _of_block(block: MatrixBlock) -> Spread | None:
    if block.kind == "dense":
        lower = torch.linalg.cholesky(block.dense().double())
        return lambda noise: (noise.to(lower.dtype) @ lower.T).to(noise.dtype)
    if block.values is None or len(block.values) < block.size or len(block.basis) > 2:
        return None
    roots, basis = (block.scale * block.values + block.shift).sqrt(), block.basis
    if len(basis) < 2:
        return lambda noise: _once(noise * roots.to(noise.dtype), basis)
    stack, shape = basis[0].shape[:-2], (basis[0].shape[-1], basis[1].shape[-1])

    def spread(noise: Tensor) -> Tensor:
        scaled = (noise * roots.to(noise.dtype)).reshape(len(noise), *stack, *shape)
        changed: Tensor = basis[0] @ scaled @ basis[1].mT
        return changed.reshape(noise.shape)

    return spread


def _once(coordinates: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """Coordinates (n, D) in no basis or one, as vectors."""
    return coordinates @ basis[0].T if basis else coordinates
