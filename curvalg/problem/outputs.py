"""Between what a model returns and the one tensor z that curvature is computed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.problem import trees


class OutputForm:
    """The structure of a model's output.

    A single tensor is z itself; several are flattened to (n, -1) and concatenated. Half precision is raised to float32,
    in which the loss and all sums are computed.

    Args:
        raw: what the model returned.

    Raises:
        ProblemError: not made of floating-point tensors, or tensors without a common leading axis.
    """

    def __init__(self, raw: Any) -> None:
        self.single = isinstance(raw, Tensor)
        leaves, self._tree = optree.tree_flatten(_plain(raw), none_is_leaf=False, namespace=trees.NAMESPACE)  # type: ignore[arg-type]
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
            return _widen(structure)
        leaves = optree.tree_leaves(_plain(structure), none_is_leaf=False, namespace=trees.NAMESPACE)  # type: ignore[arg-type]
        return torch.cat([_widen(t).reshape(t.shape[0], -1) for t in leaves], 1)  # type: ignore[arg-type,attr-defined]

    def split(self, z: Tensor) -> Any:
        """The inverse of :meth:`join`, up to the dtype."""
        if self.single:
            return z
        widths = [shape[1:].numel() for shape in self._shapes]
        parts = [t.reshape(shape) for t, shape in zip(z.split(widths, 1), self._shapes, strict=True)]
        return optree.tree_unflatten(self._tree, parts)


def _plain(raw: Any) -> Any:
    """Mappings of any class (model outputs of other libraries) as dicts, which optree knows."""
    if isinstance(raw, Mapping) and type(raw) is not dict:
        return dict(raw)
    return raw


def _widen(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
