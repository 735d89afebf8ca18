"""Conversion between what a model returns and the one tensor z that curvature is computed on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.tensors import trees
from curvalg.tensors.bits import all_finite


class OutputForm:
    """The structure of a model's output.

    A single tensor is z itself; several are flattened to (n, -1) and concatenated. Half precision is raised to float32,
    in which the loss and all sums are computed. Where a model lies on several devices, z is brought to that of the vectors.

    Args:
        raw: what the model returned.
        device: of the vectors.

    Raises:
        ProblemError: not made of floating-point tensors, or tensors without a common leading axis.
    """

    def __init__(self, raw: Any, device: torch.device) -> None:
        self._device = device
        self.single = isinstance(raw, Tensor)
        leaves, self._form = trees.flatten(raw)
        if not leaves or not all(isinstance(t, Tensor) and t.is_floating_point() for t in leaves):
            raise ProblemError(
                f"the model must return a floating-point tensor, or a tuple or mapping of them; it returned "
                f"{trees.describe(raw)}. Pass forward=lambda model, batch: ... to pick what the loss needs"
            )
        if not self.single and len({t.shape[:1] for t in leaves}) > 1:
            raise ProblemError(
                f"several outputs must share their leading axis, got {[tuple(t.shape) for t in leaves]}; pick one with "
                "forward=lambda model, batch: ..."
            )
        if any(t.ndim == 0 for t in leaves):
            raise ProblemError("the model returned a scalar; outputs need a leading axis over the samples")
        self._shapes = [t.shape for t in leaves]

    def join(self, structure: Any) -> Tensor:
        """The structure as one tensor of at least float32; gradients flow through."""
        if self.single:
            return _widen(structure, self._device)
        return torch.cat([_widen(t, self._device).reshape(t.shape[0], -1) for t in trees.leaves(structure)], 1)

    def split(self, z: Tensor) -> Any:
        """The structure from the one tensor, up to the dtype: containers of the classes that the model returned."""
        if self.single:
            return z
        widths = [shape[1:].numel() for shape in self._shapes]
        parts = [t.reshape(shape) for t, shape in zip(z.split(widths, 1), self._shapes, strict=True)]
        return trees.unflatten(self._form, parts)


def _widen(t: Tensor, device: torch.device) -> Tensor:
    return t.to(device, torch.promote_types(t.dtype, torch.float32))


def require_finite_output(z: Tensor, index: int) -> None:
    """Raise ProblemError for outputs with NaN or infinite entries, of the batch of this number."""
    if not all_finite(z):
        raise ProblemError(
            f"the model's output on batch {index} has NaN or infinite entries; check parameters and data (half precision "
            "overflows at 65504)"
        )
