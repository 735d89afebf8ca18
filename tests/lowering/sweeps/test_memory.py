"""Peaks of live memory: of a first product, of a kept one and of a fresh one, in those of a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvalg import Problem, registry
from tests.support.live_memory import LiveMemory


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = {"nhead": 4, "dim_feedforward": 256, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.embedding, self.head = nn.Embedding(64, 64), nn.Linear(64, 64)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(64, **layer) for _ in range(3))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).transpose(1, 2)


TOKENS = torch.randint(0, 64, (8, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gradient():
    """The peak of a gradient of the model."""
    model = Transformer()
    with sdpa_kernel(SDPBackend.MATH), LiveMemory() as memory:
        torch.autograd.grad(nn.functional.cross_entropy(model(TOKENS), TOKENS), [*model.parameters()])
    return memory.peak


def product(term, **options):
    """(peak of the first product, peak of the second with what is kept)."""
    problem = Problem(Transformer(), nn.CrossEntropyLoss(), (TOKENS, TOKENS), **options)
    op, v = registry.build(term).lower(problem), torch.ones(problem.size)
    with LiveMemory() as memory:
        op @ v
        first, memory.peak = memory.peak, memory.now
        op @ v
    return first, memory.peak


@pytest.mark.parametrize(
    ("term", "first", "kept"), [("hessian", 3.4, 3.4), ("ggn", 2.7, 2.4), ("covariance", 2.7, 2.4)]
)
def test_kept_products(term, first, kept, gradient):
    peaks = product(term)
    assert peaks[0] <= first * gradient
    assert peaks[1] <= kept * gradient


@pytest.mark.parametrize(("term", "most"), [("hessian", 2.7), ("ggn", 1.3), ("covariance", 1.3)])
def test_fresh_products(term, most, gradient):
    assert product(term, cache=0)[1] <= most * gradient


def test_verifying_adds_little_to_the_peak():
    """Few rows are compared before the batch is recorded: the memory of both together would be a quarter more."""
    assert product("hessian")[0] <= 1.12 * product("hessian", verify=False)[0]
