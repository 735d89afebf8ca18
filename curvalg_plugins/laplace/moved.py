"""Whether the model is still the one that a posterior was made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvalg import Problem, StaleError


def require_unmoved(problem: Problem, state: Mapping[str, Tensor]) -> None:
    """Raise unless the parameters and buffers of a problem's model, frozen ones as well, are those of a posterior.

    Args:
        problem: the training problem.
        state: what they were, by name.

    Raises:
        StaleError: one of them has another value, or lies on another device.
    """
    now = problem.snapshot().state
    if now is state:
        return
    moved = [name for name in sorted(now.keys() | state.keys()) if not _same(now.get(name), state.get(name))]
    if moved:
        more = f" and {len(moved) - 4} more" if len(moved) > 4 else ""
        raise StaleError(
            f"laplace: {', '.join(moved[:4])}{more} moved after the posterior was made; call laplace(problem, ...) again, or "
            "put the old values back"
        )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.device != b.device or a.dtype != b.dtype:
        return False
    return torch.equal(a, b)
