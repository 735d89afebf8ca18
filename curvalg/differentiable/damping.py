"""Dampings and priors as one number for every parameter, with a graph to what they were made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from curvalg.errors import OptionError
from curvalg.problem import Problem

Damping: TypeAlias = float | Tensor | Mapping[str, float | Tensor]
"""A number, one for every parameter (D,), or by the names of parameters: numbers or tensors of their shapes."""


def damping_vector(damping: Damping, problem: Problem) -> Tensor:
    """The diagonal (D,) that is added to a matrix.

    Raises:
        OptionError: names or shapes that do not fit.
    """
    layout = problem.layout
    if isinstance(damping, Mapping):
        if damping.keys() != layout.shapes.keys():
            missing, unknown = layout.shapes.keys() - damping.keys(), damping.keys() - layout.shapes.keys()
            raise OptionError(
                f"damping by names gives a number for every parameter; missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        parts = [_spread(damping[name], shape.numel(), name, problem) for name, shape in layout.shapes.items()]
        return torch.cat(parts)
    return _spread(damping, layout.size, "all parameters", problem)


def _spread(given: float | Tensor, size: int, what: str, problem: Problem) -> Tensor:
    if isinstance(given, bool) or not isinstance(given, (int, float, Tensor)):
        raise OptionError(
            f"damping is a number, a tensor, or a mapping from names of parameters to these; got {type(given).__name__}"
        )
    tensor = given if isinstance(given, Tensor) else torch.tensor(float(given), dtype=torch.float64, device="cpu")
    if (
        tensor.numel() not in (1, size)
        or not tensor.is_floating_point()
        or not math.isfinite(float(tensor.detach().sum()))
    ):
        raise OptionError(
            f"damping of {what} is one finite number or {size}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    flat = tensor.to(problem.device, problem.dtype).reshape(-1)
    return flat if flat.numel() == size else flat.expand(size)
