"""The check that tangents J v are right: ⟨u, J v⟩ = ⟨Jᵀu, v⟩ for random u and v."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvalg.problem.model_call import ModelCall
from curvalg.problem.verification.verdicts import rounding
from curvalg.tensors.memory import widest


class TangentNotes:
    """Why tangents are not taken by a route; None where it is not known to be wrong."""

    no_forward_ad: str | None = None
    no_double_backward: str | None = None


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def random_cotangent(z: Tensor, seed: int = 1) -> Tensor:
    """Standard normal numbers of the output's shape, the same in every call."""
    return torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=_generator(z.device, seed))


def random_directions(evaluation: ModelCall, seed: int = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    """A random direction for every parameter, of its shape and of a dtype (None: its own); the same in every call.

    Each is the outer product of two vectors of standard normal numbers, along the first axis and all others: no fixed error
    is orthogonal to it, and it is written in a tenth of the time that normal numbers take.
    """
    problem = evaluation.problem
    generator, layout = _generator(problem.device, seed), problem.layout
    directions = []
    for shape, own in zip(layout.shapes.values(), layout.dtypes.values(), strict=True):
        first, others = shape[:1].numel(), shape[1:].numel()
        drawn = torch.randn(first + others, device=problem.device, generator=generator).to(dtype or own)
        if drawn.dtype == torch.float16:  # an output that it can just hold must not overflow by the check itself
            drawn[:first] *= 2.0**-6
        directions.append(torch.outer(drawn[:first], drawn[first:]).reshape(shape))
    return directions


def wrong_tangent(
    evaluation: ModelCall,
    z: Tensor,
    u: Tensor,
    tangent: Tensor,
    gradients: Sequence[Tensor | None],
    directions: Sequence[Tensor],
) -> str | None:
    """Why tangents must not be used: ⟨u, J v⟩ differs from ⟨Jᵀu, v⟩; None where it does not.

    Args:
        evaluation: of the batch.
        z: the output, with its graph where there is one.
        u: a cotangent.
        tangent: J v.
        gradients: Jᵀu by parameter.
        directions: v by parameter.
    """
    pairs = [(g, v) for g, v in zip(gradients, directions, strict=True) if g is not None]
    left, left_scale = dot_of([(u.detach(), tangent)])
    right, right_scale = dot_of(pairs)
    error, scale = abs(left - right), left_scale + right_scale
    tolerance = rounding(evaluation, z)
    if error <= tolerance * scale:
        return None
    # Where J is zero but for rounding (a bias before a normalisation), the error is that of what has cancelled: v moves the
    # output by about its own size for every size of the parameters.
    natural = size_of([z]) * size_of([u]) / (size_of(evaluation.values()) or 1.0)
    if error <= FLOOR * tolerance**2 * natural * z.numel():
        return None
    return f"J v disagrees with the gradient (⟨u, J v⟩ = {left:.6g}, ⟨Jᵀu, v⟩ = {right:.6g})"


FLOOR = 1e2
"""Rounding errors of a sum whose parts cancel, in units of its size and the machine epsilon."""


def size_of(tensors: Sequence[Tensor]) -> float:
    """The root of the mean square of all elements."""
    return norm_of(tensors) / math.sqrt(max(sum(t.numel() for t in tensors), 1))


def norm_of(tensors: Sequence[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(t.detach(), dtype=widest(t.device)) for t in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0


def dot_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The inner product, and the size that the sum of its random parts has."""
    products = [a.detach().to(widest(a.device), copy=True).mul_(b.detach()) for a, b in pairs]
    total = float(torch.stack([product.sum() for product in products]).sum()) if products else 0.0
    return total, norm_of(products)
