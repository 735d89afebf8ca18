"""Data, losses and references of the tests of models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from curvalg import Problem, registry
from tests.support.dense import Case, Dense

draws = torch.Generator().manual_seed(1)


def rng():
    """A fresh generator of the same numbers."""
    return torch.Generator().manual_seed(2)


N = 6
X = torch.randn(N, 3, generator=draws).double()
Y = torch.tensor([0, 2, 1, 1, 0, 2])
R = torch.randn(N, 3, generator=draws).double()
S = torch.randn(N, 3, 4, generator=draws).double()  # sequences of three steps of width 4
CE = nn.CrossEntropyLoss()
TERMS = ("hessian", "ggn", "covariance", "centered_covariance")


def ce(z, y, **options):
    """Cross-entropy of every row."""
    return F.cross_entropy(z, y, reduction="none", **options)


def batches(x=X, y=Y):
    """Six rows in uneven batches."""
    return [(x[:2], y[:2]), (x[2:5], y[2:5]), (x[5:], y[5:])]


def reference(model, x=X, y=Y, **options):
    """Dense matrices of a model under plain cross-entropy."""
    return Dense(Case(model, None, batches(x, y), ce, float(len(y)), **options))


def lower(name, problem):
    """The operator of a term by its name."""
    return registry.build(name).lower(problem)


def ones(op):
    """A vector of ones that the operator takes."""
    return torch.ones(op.shape[1]).double()


def product(name, *args, **options):
    """A term times a vector of ones, of the problem made of the rest."""
    op = lower(name, Problem(*args, **options))
    return op @ torch.ones(op.shape[1])


def mlp():
    """Two layers with a tanh between."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def clone_state(model):
    """Copies of parameters and buffers."""
    return {name: t.clone() for name, t in model.state_dict().items()}


def same_state(model, before):
    """Whether parameters and buffers are those of the copies, to the bit."""
    return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class Post(nn.Module):
    """Two layers, and a function of their outputs."""

    def __init__(self, post) -> None:
        super().__init__()
        self.inner, self.post = mlp(), post

    def forward(self, x):
        return self.post(self.inner(x))
