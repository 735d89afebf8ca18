"""Walks over autograd graphs and questions about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvalg.errors import ProblemError


def nodes(roots: Iterable[Tensor | GradientEdge | None]) -> Iterator[Any]:
    """Every node of the graphs that lead to some tensors or edges, each once."""
    todo = [root.node if isinstance(root, GradientEdge) else root.grad_fn for root in roots if root is not None]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(parent for parent, _ in node.next_functions)


def operations(roots: Iterable[Tensor | GradientEdge | None]) -> frozenset[str]:
    """Names of the operations in the graphs of some tensors, but for conversions of dtypes."""
    return frozenset(node.name() for node in nodes(roots)) - {"ToCopyBackward0"}


def coarsest_dtype(z: Tensor) -> torch.dtype:
    """The floating dtype of the largest rounding error among all intermediate results that a graph shows."""
    found = {z.dtype}
    for node in nodes([z]):
        metadata = getattr(node, "_input_metadata", ())
        # Results that do not exist are shown as scalars in float32.
        real = (m for i, m in enumerate(metadata) if i == 0 or len(m.shape))
        found.update(m.dtype for m in real if m.dtype.is_floating_point)
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def require_second_derivatives(gradients: Sequence[Tensor | None]) -> None:
    """Raise for gradients whose graph hides an operation that has no second derivative.

    Raises:
        ProblemError: it does.
    """
    # torch.autograd.grad never runs the node that would raise, when it does not lead to the inputs: the branch is cut
    # without a word.
    for node in nodes(gradients):
        if node.name() in ("torch::autograd::Error", "Error"):
            raise ProblemError(
                "an operation of the model can be differentiated only once (once_differentiable?), but curvature needs its "
                "second derivative; write its backward with differentiable operations"
            )
