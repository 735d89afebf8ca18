"""Numbers and structures as what travels between processes, and back."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from curvalg.tensors import trees

T = TypeVar("T")


class TensorForm:
    """The shape and dtype of a tensor that another rank has."""

    def __init__(self, t: Tensor) -> None:
        self.shape, self.dtype = tuple(t.shape), t.dtype

    def zeros(self, device: torch.device) -> Tensor:
        """Such a tensor of zeros."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def measures(tensors: Sequence[Tensor | None]) -> tuple[float, float, float, float]:
    """How many numbers there are, their sum with weights by their places, its size, and the rounding that it may have."""
    flat = [t.detach().reshape(-1) for t in tensors if t is not None]
    total, size, count = 0.0, 0.0, 0
    for t in flat:
        places = torch.arange(1 + count, 1 + count + len(t), device=t.device).to(torch.float32)
        weighted = t * torch.cos(places).to(t.dtype)
        total, size, count = total + float(weighted.sum()), size + float(weighted.abs().sum()), count + len(t)
    rounding = max((torch.finfo(t.dtype).eps for t in flat), default=1.0) ** (2 / 3)
    return float(count) if flat else -1.0, total, size, rounding


def packed(own: Any) -> bytes:
    """An object as bytes, tensors on any device."""
    buffer = io.BytesIO()
    torch.save(own, buffer)
    return buffer.getvalue()


def joined_numbers(flat: Sequence[Tensor]) -> Tensor | None:
    """All numbers one after the other, in a precision that holds them; None of none."""
    if not flat:
        return None
    wide = any(t.dtype == torch.float64 or not t.is_floating_point() for t in flat)
    return torch.cat([t.detach().reshape(-1).to(torch.float64 if wide else torch.float32) for t in flat])


def filled(value: T, numbers: Tensor) -> T:
    """A tree of the same form with other numbers, one tensor after the other."""
    at = 0

    def take(t: Tensor) -> Tensor:
        nonlocal at
        part = numbers[at : at + t.numel()]
        at += t.numel()
        return part.reshape(t.shape).to(t.device, t.dtype)

    return trees.tensor_map(take, value)  # type: ignore[no-any-return]


def riding(words: Sequence[int], count: int) -> Tensor:
    """So many numbers whose bits are given as integers."""
    return torch.tensor(words[:count], device="cpu").view(torch.float64)
