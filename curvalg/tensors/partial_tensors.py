"""Tensors of which this process has a part only."""

from __future__ import annotations

from torch import Tensor, nn


class PartOfVector(Tensor):
    """A tensor that was computed from this process's part of a vector over sharded parameters, and whatever is made of it."""


def is_part(tensor: object) -> bool:
    """Whether something is a DTensor."""
    return type(tensor) not in (Tensor, nn.Parameter) and is_distributed(tensor, "DTensor")


def is_distributed(thing: object, name: str) -> bool:
    """Whether something is of a class of torch.distributed: by name, since few have it, and importing it takes long."""
    return any(c.__name__ == name and c.__module__.startswith("torch.distributed.") for c in type(thing).__mro__)
