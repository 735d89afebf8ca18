"""Walks over autograd graphs and questions about them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvalg.errors import ProblemError


def nodes(roots: Iterable[Tensor | GradientEdge | None]) -> Iterator[Any]:
    """Every node of the graphs that lead to some tensors or edges, each once."""
    todo = [root.node if isinstance(root, GradientEdge) else root.grad_fn for root in roots if root is not None]
    seen: set[Any] = {None}
    for start in todo:  # a fresh product walks its graph: every call counts
        if start in seen:
            continue
        seen.add(start)
        found: list[Any] = [start]
        for node in found:
            yield node
            for parent, _ in node.next_functions:
                if parent not in seen:
                    seen.add(parent)
                    found.append(parent)


def saved_bytes(roots: Iterable[Tensor | GradientEdge], *, without: Iterable[Tensor] = ()) -> int:
    """Memory that graphs hold, as far as their nodes show it, and that of their ends: distinct storages, each once.

    Args:
        roots: tensors, or edges where the tensors themselves are not held.
        without: tensors whose memory does not count.
    """
    roots = list(roots)
    storages: dict[int, int] = {}

    def count(value: object) -> None:
        if isinstance(value, Tensor) and value.layout == torch.strided:
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()  # the object that stands for it: there may be no memory behind

    for root in roots:
        count(root)
    for node in nodes(roots):
        for name in dir(node):
            if name.startswith("_saved_"):
                try:
                    value = getattr(node, name)
                except RuntimeError:  # a saved tensor that was freed or changed in place says nothing
                    continue
                for item in value if isinstance(value, (tuple, list)) else (value,):
                    count(item)
    held = {t.untyped_storage()._cdata for t in without}
    return sum(nbytes for key, nbytes in storages.items() if key not in held)


def operations(roots: Iterable[Tensor | GradientEdge | None]) -> frozenset[str]:
    """Names of the operations in the graphs of some tensors, but for conversions of dtypes."""
    return frozenset(node.name() for node in nodes(roots)) - {"ToCopyBackward0"}


def numbers_each(z: Tensor) -> float:
    """How many numbers an operation in the graph of a tensor gives, in the mean: what its calls leave of work."""
    found: list[int] = [
        math.prod(data.shape) for node in nodes([z]) for data in getattr(node, "_input_metadata", ())[:1]
    ]
    return sum(found) / max(len(found), 1)


def coarsest_dtype(z: Tensor) -> torch.dtype:
    """The floating dtype of the largest rounding error among all intermediate results that a graph shows."""
    found = {z.dtype}
    for node in nodes([z]):
        metadata = getattr(node, "_input_metadata", ())
        # Results that do not exist are shown as scalars in float32.
        real = (m for i, m in enumerate(metadata) if i == 0 or len(m.shape))
        found.update(m.dtype for m in real if m.dtype.is_floating_point)
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def require_second_derivatives(found: frozenset[str]) -> None:
    """Raise where the graph of gradients hides an operation that has no second derivative.

    Args:
        found: the operations in it.

    Raises:
        ProblemError: there is one.
    """
    # torch.autograd.grad never runs the node that would raise, when it does not lead to the inputs: the branch is cut
    # without a word.
    if not found.isdisjoint(("torch::autograd::Error", "Error")):
        raise ProblemError(
            "an operation of the model can be differentiated only once (once_differentiable?), but curvature needs its "
            "second derivative; write its backward with differentiable operations"
        )


def leaf_tensors(roots: Iterable[Tensor | GradientEdge | None]) -> list[Tensor]:
    """The tensors that require gradients at the ends of the graphs of some others, each once."""
    return [node.variable for node in nodes(roots) if hasattr(node, "variable")]
