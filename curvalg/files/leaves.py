"""Array leaves as tensors with a description that JSON can hold, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvalg.expr import Diagonal, Eigenbasis, Kronecker, LowRank
from curvalg.expr.nodes.arrays import ArrayLeaf

Described = dict[str, Any]
"""What JSON can hold."""

PARTS: dict[type[ArrayLeaf], tuple[str, ...]] = {
    Diagonal: ("values",),
    Kronecker: ("factors", "order"),
    LowRank: ("left", "core", "right"),
    Eigenbasis: ("basis", "values"),
}
"""Leaves, and the attributes that they are made from."""
_CLASSES = {kind.__name__: kind for kind in PARTS}


def describe_leaf(leaf: ArrayLeaf, name: str, tensors: dict[str, Tensor]) -> Described:
    """A leaf's description; its arrays go to ``tensors``, under names that begin with the given one."""
    parts = {part: _describe(getattr(leaf, part), f"{name}.{part}", tensors) for part in PARTS[type(leaf)]}
    return {"kind": type(leaf).__name__, "token": leaf.token, "parts": parts}


def _describe(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if value is None:
        return None
    if isinstance(value, ArrayLeaf):
        return {"leaf": describe_leaf(value, name, tensors)}
    if isinstance(value, tuple):
        return {"several": [_describe(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]}
    array = value.detach().to("cpu") if isinstance(value, Tensor) else torch.from_numpy(value)
    tensors[name] = array
    # Products of a transposed array differ in their last bits from those of its contiguous copy.
    return {"tensor": name, "strides": _strides(array), "numpy": not isinstance(value, Tensor)}


def _strides(array: Tensor) -> list[int]:
    """Strides of a copy that keeps the order of the axes in memory."""
    return list(torch.empty_like(array, memory_format=torch.preserve_format).stride())


def read_leaf(described: Described, tensors: Mapping[str, Tensor]) -> ArrayLeaf:
    """The leaf of a description, equal to the one that was described.

    Raises:
        Exception: of any kind, for what is no description.
    """
    kind = _CLASSES[described["kind"]]
    parts = {name: _read(part, tensors) for name, part in described["parts"].items()}
    leaf = kind(*parts.pop("factors"), **parts) if kind is Kronecker else kind(**parts)
    leaf.__dict__["token"] = str(described["token"])
    return leaf


def _read(described: Any, tensors: Mapping[str, Tensor]) -> Any:
    if described is None:
        return None
    if "leaf" in described:
        return read_leaf(described["leaf"], tensors)
    if "several" in described:
        return tuple(_read(part, tensors) for part in described["several"])
    stored = tensors[described["tensor"]]
    array = torch.empty_strided(stored.shape, described["strides"], dtype=stored.dtype, device="cpu").copy_(stored)
    return array.numpy() if described["numpy"] else array
