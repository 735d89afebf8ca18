"""Six rows of inputs and targets, and what may hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

CPU = torch.device("cpu")
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, 1, 0, 2])


class Frozen(Mapping):
    """A mapping that is no dict, and cannot be changed."""

    def __init__(self, **items):
        self._items = items

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


@dataclasses.dataclass(frozen=True)
class Bag:
    """A data class whose first field holds tensors."""

    x: torch.Tensor
    y: object = None


def batches(order, size, x=X, y=Y):
    """The rows in an order, in batches of a size."""
    return [(x[k], y[k]) for k in torch.as_tensor(order).split(size)]
