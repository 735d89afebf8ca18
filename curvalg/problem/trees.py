"""Nested batches and outputs: tensors inside tuples, lists, dicts, named tuples and UserDicts."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

NAMESPACE = "curvalg"


def _is_user_dict(node: Any) -> bool:
    return isinstance(node, UserDict)


def tensor_map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The tree with every tensor replaced; everything else, and the kind of every container, stays."""

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, UserDict):
            twin = copy.copy(leaf)
            twin.data = tensor_map(function, dict(leaf.data))
            return twin
        return leaf

    return optree.tree_map(visit, tree, is_leaf=_is_user_dict, none_is_leaf=True, namespace=NAMESPACE)  # type: ignore[arg-type]


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a tree, in its order."""
    found: list[Tensor] = []
    tensor_map(lambda t: found.append(t), tree)
    return found


def add(left: Any, right: Any) -> Any:
    """Two statistics of the same structure, added leaf by leaf; None counts as nothing yet."""
    if left is None or right is None:
        return right if left is None else left
    return optree.tree_map(torch.add, left, right, namespace=NAMESPACE)


def rows(tree: Any) -> int | None:
    """Length of the leading axis of the first tensor that has one."""
    return next((t.shape[0] for t in tensors(tree) if t.ndim), None)


def place(tree: Any, device: torch.device) -> Any:
    """The tree on a device; inference tensors are cloned, since autograd refuses them."""

    def move(t: Tensor) -> Tensor:
        t = t.to(device, non_blocking=True)
        return t.clone() if t.is_inference() else t

    return tensor_map(move, tree)


def describe(value: Any) -> str:
    """Kind and shapes of a value, for messages."""
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (Mapping, UserDict)):
        return f"{type(value).__name__} with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(describe(v) for v in value[:4])}{', …' if len(value) > 4 else ''})"
    return type(value).__name__
