"""Products with leaves that hold arrays."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from curvalg.expr.nodes.arrays import ArrayLeaf, Diagonal, Eigenbasis, Kronecker, LowRank
from curvalg.lowering.matrices.bases import ordered


def tensor(array: Any, like: Tensor) -> Tensor:
    """An array of a leaf as a tensor of the operand's dtype and device."""
    given = array if isinstance(array, Tensor) else torch.as_tensor(array, device="cpu")
    return given.detach().to(dtype=like.dtype, device=like.device)


def rounding(array: Any) -> float:
    """The unit of rounding of an array's dtype; 0 of whole numbers, which are exact."""
    dtype = array.dtype if isinstance(array, Tensor) else torch.as_tensor(array, device="cpu").dtype
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def numbers(array: Any, like: Tensor) -> Tensor | None:
    """An array of row numbers as a tensor on the operand's device, or None."""
    return None if array is None else torch.as_tensor(array, device=like.device)


@singledispatch
def multiply(leaf: ArrayLeaf, x: Tensor, transpose: bool) -> Tensor:
    """The leaf (or its transpose) times x (n, K)."""
    raise NotImplementedError(f"no product is registered for {type(leaf).__name__}")


@multiply.register
def _(leaf: Diagonal, x: Tensor, transpose: bool) -> Tensor:
    return tensor(leaf.values, x)[:, None] * x


@multiply.register
def _(leaf: Kronecker, x: Tensor, transpose: bool) -> Tensor:
    factors = [tensor(f, x) for f in leaf.factors]
    return ordered([f.mT for f in factors] if transpose else factors, x, numbers(leaf.order, x))


@multiply.register
def _(leaf: LowRank, x: Tensor, transpose: bool) -> Tensor:
    left = tensor(leaf.left, x)
    right = left if leaf.right is None else tensor(leaf.right, x)
    if transpose:
        left, right = right, left
    inner = right.T @ x
    if leaf.core is not None:
        core = tensor(leaf.core, x)
        inner = core[:, None] * inner if core.ndim == 1 else (core.T if transpose else core) @ inner
    return left @ inner


@multiply.register
def _(leaf: Eigenbasis, x: Tensor, transpose: bool) -> Tensor:
    values = tensor(leaf.values, x)[:, None]
    if isinstance(leaf.basis, Kronecker):
        return multiply(leaf.basis, values * multiply(leaf.basis, x, True), False)
    basis = tensor(leaf.basis, x)
    return basis @ (values * (basis.T @ x))
