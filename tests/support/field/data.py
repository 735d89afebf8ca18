"""Networks, data and losses of the tests of data."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from curvalg import Problem, registry

draws = torch.Generator().manual_seed(0)
N = 7
X = torch.randn(N, 3, generator=draws).double()
Y = torch.tensor([0, 2, 1, 1, 0, 2, 2])
R = torch.randn(N, 3, generator=draws).double()
UNIT = torch.rand(N, 3, generator=draws).double()
CE = nn.CrossEntropyLoss()
PAIRS = TensorDataset(X, Y)


class Net(nn.Module):
    """Two layers; extra inputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, shift=None):
        return self.head(torch.tanh(self.body(x if shift is None else x + shift)))


def ce(z, y, **options):
    """Cross-entropy of every row."""
    return F.cross_entropy(z, y, reduction="none", **options)


def mse(z, y):
    """Squared error of every row, summed over outputs."""
    return (z - y).square().sum(1)


def fresh(*args, **options):
    """A problem that reads the data in every product: what is kept is immune to loaders that change."""
    return Problem(*args, **{"cache": 0, **options})


def lower(name, problem):
    """The operator of a term by its name."""
    return registry.build(name).lower(problem)


def ones(op):
    """A vector of ones that the operator takes."""
    return torch.ones(op.shape[1]).double()


SENTENCES = [torch.randint(0, 6, (n,), generator=draws) for n in (4, 1, 3, 5, 2, 2)]
TAGS = [torch.randint(0, 3, (len(s),), generator=draws) for s in SENTENCES]


class OwnMapping(Mapping):
    """A mapping that is no dict."""

    def __init__(self, **data):
        self._data = data

    def __getitem__(self, key):
        return self._data[key]

    def __iter__(self):
        return iter(self._data)

    def __len__(self):
        return len(self._data)


class Augmented(Dataset):
    """The rows of (X, Y), changed in another way each time they are read."""

    def __init__(self, change):
        self.change = change

    def __len__(self):
        return N

    def __getitem__(self, k):
        return self.change(X[k], Y[k])


AUGMENTATIONS = {
    "torch noise": lambda x, y: (x + 0.1 * torch.randn_like(x), y),
    "NumPy noise": lambda x, y: (x + 0.1 * np.random.randn(), y),
    "Python noise": lambda x, y: (x + 0.1 * random.random(), y),
    "small noise": lambda x, y: (x + 1e-6 * torch.randn_like(x), y),
    "random flips": lambda x, y: (x.flip(0) if torch.rand(()) < 0.5 else x, y),
    "random signs": lambda x, y: (-x if random.random() < 0.5 else x, y),
    "noisy labels": lambda x, y: (x, (y + torch.randint(0, 3, ())) % 3),
    "mixing inputs": lambda x, y: (0.9 * x + 0.1 * X[torch.randint(0, N, ())], y),
    "complex noise": lambda x, y: (torch.complex(x, 0.1 * torch.randn_like(x)), y),
}
