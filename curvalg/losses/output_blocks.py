"""Square roots of the blocks of a Hessian in output space."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.errors import LossError


def square_roots(name: str, blocks: Tensor) -> Tensor:
    """√λ q of every eigenpair of symmetric blocks (n, d, d), as columns.

    Raises:
        LossError: a block is not finite, or not positive semi-definite.
    """
    values, vectors = _eigenpairs(name, blocks)
    largest = values.abs().max() if values.numel() else 0.0
    noise = 32 * values.shape[-1] * torch.finfo(values.dtype).eps * largest
    if bool((values < -noise).any()):
        raise LossError(
            f"{name}: the Hessian in the output is not positive semi-definite (least eigenvalue "
            f"{values.min().item():.3g}), so it has no square root; use the hessian, or a convex loss"
        )
    columns: Tensor = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return columns


def _eigenpairs(name: str, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs in the dtype of the blocks, or by float64 on the CPU where that does not converge (close in float32)."""
    if not bool(torch.isfinite(blocks).all()):
        raise LossError(
            f"{name}: the Hessian in the output has NaN or infinite entries; smooth the loss there (as sqrt(x + eps))"
        )
    try:
        values, vectors = torch.linalg.eigh(blocks)
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
            return values, vectors
        values, vectors = torch.linalg.eigh(blocks.cpu().double())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values, vectors = torch.linalg.eigh(blocks.cpu().double())
    return values.to(blocks), vectors.to(blocks)
