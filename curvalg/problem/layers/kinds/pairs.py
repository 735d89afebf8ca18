"""Inner products of gradients that are sums over positions, without the gradients themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvalg.problem.model.layer_record import steps

Similarity = Callable[[slice, slice], Tensor]
"""(rows, rows') -> ⟨hₙₜ, h'ₙ'ₜ'⟩ of shape (n, T, n', T')."""


def pair_flops(left: Tensor, right: Tensor, width: int) -> float:
    """The cost of :func:`pair_gram`, in multiplications.

    Args:
        left: δ (K, n, T, out).
        right: δ' (K', n', T', out).
        width: of the inputs.
    """
    columns, rows, positions, out = left.shape
    pairs = rows * right.shape[1]
    others, length = right.shape[0], right.shape[2]
    return pairs * positions * (length * width + others * out * (length + columns))


def pair_gram(left: Tensor, right: Tensor, similarity: Similarity) -> Tensor:
    """Inner products Σₜₜ' ⟨hₙₜ, h'ₙ'ₜ'⟩ ⟨δₖₙₜ, δ'ₖ'ₙ'ₜ'⟩, shape (K, n, K', n').

    For each pair of rows first Σₜ' ⟨h, h'⟩ δ', then its products with δ: no tensor has all of k, k', t and t'.

    Args:
        left: δ (K, n, T, out).
        right: δ' (K', n', T', out).
        similarity: of the inputs.
    """
    columns, rows, positions, out = left.shape
    others, other_rows, length, _ = right.shape
    gram = left.new_empty(columns, rows, others, other_rows)
    pair = positions * max(length, others * out)
    for a in steps(rows, pair, left.dtype):
        here = left[:, a].transpose(0, 1).reshape(-1, columns, positions * out)
        count = here.shape[0]
        for b in steps(other_rows, pair * count, left.dtype):
            alike = similarity(a, b).permute(2, 0, 1, 3).reshape(-1, count * positions, length)
            there = right[:, b].permute(1, 2, 0, 3).reshape(-1, length, others * out)
            mixed = (alike @ there).reshape(-1, count, positions, others, out)
            mixed = mixed.permute(1, 2, 4, 0, 3).reshape(count, positions * out, -1)
            block = (here @ mixed).reshape(count, columns, -1, others)
            gram[:, a, :, b] = block.permute(1, 0, 3, 2)
    return gram


def explicit_gram(
    left: Callable[[slice], Tensor],
    right: Callable[[slice], Tensor],
    shape: tuple[int, int, int, int],
    like: Tensor,
    size: int,
) -> Tensor:
    """Inner products ⟨gₖₙ, g'ₖ'ₙ'⟩ of multiplied-out gradients, some rows at a time.

    Args:
        left: rows -> their gradients (n, K, size).
        right: likewise, for the other side.
        shape: (K, n, K', n').
        like: of the dtype and device.
        size: numbers in a gradient.
    """
    columns, rows, others, other_rows = shape
    gram = like.new_empty(shape)
    blocks = steps(other_rows, others * size, like.dtype)
    only = right(blocks[0]) if len(blocks) == 1 else None
    for a in steps(rows, columns * size, like.dtype):
        here = left(a)
        for b in blocks:
            there = right(b) if only is None else only
            block = here.flatten(0, 1) @ there.flatten(0, 1).T
            block = block.reshape(here.shape[0], columns, there.shape[0], others)
            gram[:, a, :, b] = block.permute(1, 0, 3, 2)
    return gram


def passes(rows: int, columns: int, size: int, dtype: torch.dtype) -> int:
    """The number of blocks that the gradients of so many rows are cut into."""
    return len(steps(rows, columns * size, dtype))
