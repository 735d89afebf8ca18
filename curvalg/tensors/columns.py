"""Products with many columns: one after the other, or in batched backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import optree
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvalg.tensors.backward import backward
from curvalg.tensors.trees import NAMESPACE

T = TypeVar("T")


def _columns(tree: tuple[Any, ...]) -> int:
    if isinstance(tree[0], Tensor):
        return int(tree[0].shape[0])
    leaves: list[Any] = optree.tree_leaves(cast("Any", tree), namespace=NAMESPACE)
    return int(leaves[0].shape[0])


def mapped(function: Callable[..., T], *trees: Any) -> T:
    """A function over the leading axis of all leaves: directly for one column, by vmap for several.

    Args:
        function: for one column.
        trees: pytrees of tensors with a leading column axis; None passes through.
    """
    columns = _columns(trees)
    if columns == 1:
        first = [optree.tree_map(lambda t: t[0], tree, namespace=NAMESPACE) for tree in trees]
        result: Any = function(*first)
        return cast("T", optree.tree_map(lambda t: t[None], result, namespace=NAMESPACE))
    dims = tuple(None if tree is None else 0 for tree in trees)
    return torch.func.vmap(function, in_dims=dims)(*trees)


def chunked(function: Callable[..., T], chunk: int, *trees: Any) -> T:
    """A function of column-leading pytrees, applied to at most ``chunk`` columns at a time and put together again."""
    columns = _columns(trees)
    if columns <= chunk:
        return function(*trees)
    parts: list[Any] = [
        function(*(optree.tree_map(lambda t, at=at: t[at : at + chunk], tree, namespace=NAMESPACE) for tree in trees))
        for at in range(0, columns, chunk)
    ]
    return cast("T", optree.tree_map(lambda *ts: torch.cat(ts), *parts, namespace=NAMESPACE))


def grad_columns(
    outputs: Sequence[Tensor | GradientEdge | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    retain: bool,
) -> list[Tensor | None]:
    """Sums Σ cotangentᵀ ∂outputs/∂inputs for cotangents with a leading column axis; one backward pass for all columns."""
    if cotangents[0].shape[0] == 1:
        single = backward(outputs, inputs, [c[0] for c in cotangents], retain_graph=retain)
        return [None if g is None else g[None] for g in single]
    return backward(outputs, inputs, cotangents, retain_graph=retain, batched=True)
