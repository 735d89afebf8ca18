"""Products of the rearranged curvature of a layer with a Kronecker factor, from its inputs h and output deltas δ.

With the gradients G = Σ_t δ hᵀ of all columns the block is M = Σ vec(G) vec(G)ᵀ, and its rearrangement R (Van Loan and
Pitsianis) maps vec(A) to Σ vec(G A Gᵀ) and back vec(B) to Σ vec(Gᵀ B G): the best B ⊗ A is the leading singular pair of R.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from curvalg_plugins.kronecker.factors import CHUNK, gram

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from curvalg import FactorPairs

Side = Literal["outputs", "inputs"]


def moments(pair: FactorPairs, side: Side, other: Tensor, width: int) -> Tensor:
    """The sums of each group for one side (groups, n, n), given positive semi-definite factors (groups, m, m) of the other.

    Args:
        pair: of the layer.
        side: of the sums.
        other: the factors of the other side.
        width: of inputs, with a one behind them where that is a number more than they are.
    """
    function = output_moment if side == "outputs" else input_moment
    parts = zip(pair.inputs, pair.deltas, other, strict=True)
    return torch.stack([function(_extended(h, width), d, factor) for h, d, factor in parts])


def output_moment(h: Tensor, d: Tensor, inputs: Tensor) -> Tensor:
    """The sum Σ G A Gᵀ (out, out).

    Args:
        h: (n, T, in).
        d: δ (K, n, T, out).
        inputs: A.
    """
    if h.shape[1] == 1:  # (hᵀ A h) δ δᵀ
        weights = ((h[:, 0] @ inputs) * h[:, 0]).sum(-1).clamp_min(0).sqrt()
        return gram((weights[:, None] * d[:, :, 0]).flatten(0, 1))
    total = d.new_zeros(d.shape[-1], d.shape[-1])
    for gradients in _gradients(h, d):
        total += torch.einsum("boi,bpi->op", gradients @ inputs, gradients)
    return (total + total.T) / 2


def input_moment(h: Tensor, d: Tensor, outputs: Tensor) -> Tensor:
    """The sum Σ Gᵀ B G (in, in), for h and δ as of :func:`output_moment`."""
    if h.shape[1] == 1:  # (δᵀ B δ) h hᵀ
        weights = ((d[:, :, 0] @ outputs) * d[:, :, 0]).sum((0, 2)).clamp_min(0).sqrt()
        return gram(weights[:, None] * h[:, 0])
    total = h.new_zeros(h.shape[-1], h.shape[-1])
    for gradients in _gradients(h, d):
        total += torch.einsum("boi,boj->ij", outputs @ gradients, gradients)
    return (total + total.T) / 2


def _extended(h: Tensor, width: int) -> Tensor:
    """The inputs, followed by a one where they are to be wider."""
    return h if width == h.shape[-1] else torch.cat([h, torch.ones_like(h[..., :1])], -1)


def _gradients(h: Tensor, d: Tensor) -> Iterator[Tensor]:
    """The gradients G (columns and rows, out, in), some at a time."""
    columns, rows, _, out = d.shape
    step = max(1, CHUNK // (columns * out * h.shape[-1]))
    for at in range(0, rows, step):
        some = d[:, at : at + step].permute(1, 0, 3, 2).flatten(1, 2)  # (n, K · out, T)
        yield (some @ h[at : at + step]).reshape(-1, out, h.shape[-1])


def units(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices (groups, n, n) of Frobenius norm one, and their norms (groups,); zeros stay."""
    peaks = factors.flatten(1).abs().amax(1)
    scaled = factors / _divisors(peaks)  # first: squares of entries beyond 1e±19 leave the range of float32
    norms = scaled.flatten(1).norm(dim=1)
    return scaled / _divisors(norms), peaks * norms


def _divisors(sizes: Tensor) -> Tensor:
    """What matrices (groups, n, n) of these sizes (groups,) are divided by."""
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes))[:, None, None]
