"""Outputs that are neither tensors nor dictionaries."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch

Z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 2, 1, 1, 0, 2])


class ModelOutput(OrderedDict):
    """Entries are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Record:
    """Outputs with their loss."""

    logits: torch.Tensor
    loss: object = None


Named = namedtuple("Named", ["logits", "extra"])
STRUCTURES = {
    "model output": ModelOutput(loss=None, logits=Z, extra=(Z.exp(),)),
    "data class": Record(Z),
    "named tuple": Named(Z, Z[:, :1]),
}
