"""Fingerprints of batches: whether a later pass over the data gives the same rows, and whether in the same order.

Every row of a tensor is hashed to one number, h = Σⱼ xⱼ cos(j). Sums of h and h² over the rows see every change of an
entry, but not the order; sums of products of neighbouring tensors' hashes see which rows belong together; a sum that
weighs rows by their place sees the order too. Floating and discrete tensors have sums of their own, so that large labels
do not hide small changes of the inputs. Of a batch of graphs each graph has one number for each of its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from curvalg.tensors import trees
from curvalg.tensors.memory import wide

Fingerprint: TypeAlias = tuple[tuple[float, float], ...]
"""Sums, each with that of the magnitudes of its terms; the last depends on the order of the rows."""

# Sums in another order differ by rounding only, relative to the sum of magnitudes.
TOLERANCE = 1e-9


def fingerprint(batch: Any, rows: int) -> Fingerprint:
    """The fingerprint of one batch with the given number of samples."""
    with torch.no_grad():
        hashes = [hashed for hashed in _hashes(batch) if len(hashed.values)]
        floating = _join([h.values for h in hashes if h.inexact])
        discrete = _join([h.values for h in hashes if not h.inexact])
        aligned = [h.values for h in hashes if h.by_row and len(h.values) == rows]
        together = _join([left * right for left, right in pairwise(aligned)])
        placed = _join([_waves(len(h.values)) * h.values / (k + 1) for k, h in enumerate(hashes)])
        terms = (floating, floating.square(), discrete, discrete.square(), together, placed)
        return tuple((float(t.sum()), float(t.abs().sum())) for t in terms)


def total(prints: Sequence[Fingerprint]) -> Fingerprint:
    """The fingerprint of all batches together, as a whole without an order."""
    return tuple((sum(s for s, _ in column), sum(m for _, m in column)) for column in zip(*prints, strict=True))


def same_rows(left: Fingerprint, right: Fingerprint) -> bool:
    """Whether two fingerprints are those of the same rows in any order."""
    # Not zip alone: a pass without batches has no sums at all.
    return len(left) == len(right) and all(map(_close, left[:-1], right[:-1]))


def same_order(left: Fingerprint, right: Fingerprint) -> bool:
    """Whether two fingerprints of batches are those of the same rows in the same order."""
    return same_rows(left, right) and _close(left[-1], right[-1])


def _close(left: tuple[float, float], right: tuple[float, float]) -> bool:
    return abs(left[0] - right[0]) <= TOLERANCE * (1 + right[1])


class _Hashed(NamedTuple):
    """One number for every row of a tensor, or for every graph."""

    values: Tensor
    inexact: bool
    by_row: bool


def _hashes(batch: Any) -> list[_Hashed]:
    """The hashes of all tensors of a batch."""
    found = []
    for part in batch if type(batch) in (tuple, list) else [batch]:
        if (graphs := trees.graphs_of(part)) is None:
            found += [_Hashed(_hash(t), _is_inexact(t), t.ndim > 0) for t in trees.tensors(part)]
            continue
        # In a batch edges point to other numbers, by the graphs before them; taken apart, they do not.
        for same in zip(*map(trees.tensors, graphs), strict=True):
            hashes = torch.cat([_hash(t.reshape(1, -1)) for t in same])
            found.append(_Hashed(hashes, _is_inexact(same[0]), True))
    return found


def _is_inexact(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _hash(t: Tensor) -> Tensor:
    """One number for every row, on the CPU."""
    if t.layout != torch.strided:
        t = t.to_dense()
    if not t.numel():
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    rows = wide(t.detach().reshape(len(t) if t.ndim else 1, -1))
    # Any numbers do for entries that are not finite, as in masks, but sums must not overflow.
    rows = rows.nan_to_num(nan=0.5, posinf=1e3, neginf=-1e3)
    return (rows @ _waves(rows.shape[1]).to(rows)).cpu().double()


def _waves(length: int) -> Tensor:
    return torch.cos(torch.arange(1, length + 1, dtype=torch.float64, device="cpu"))


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device="cpu")
