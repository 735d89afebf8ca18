"""Inputs of a layer that lie in other rows than their number says are given to their rows in every recording of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Problem, registry

D = torch.float64
X = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=D)
SIGNS = torch.tensor([[1, -1, -1], [1, 1, 1], [1, 1, -1], [-1, -1, -1]])
"""Of the first numbers of the tokens: a layer that sees those above zero has two for each row of a batch, and one has none."""


class Chosen(nn.Module):
    """A layer that sees some tokens of each row, between two that see all."""

    def __init__(self) -> None:
        super().__init__()
        self.some, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        at = (tokens[:, 0] > 0).nonzero()[:, 0]
        hidden = torch.zeros(len(tokens), 4, dtype=D).index_add(0, at, self.some(tokens[at]).tanh())
        return self.head(hidden.unflatten(0, x.shape[:2]).sum(1))


@pytest.fixture
def problem():
    torch.manual_seed(0)
    x = X.clone()
    x[..., 0] = x[..., 0].abs() * SIGNS
    pairs = [(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([1, 0]))]
    return Problem(Chosen().to(D), nn.CrossEntropyLoss(), pairs)


def row_gradients(problem, model):
    """The gradients of all rows' losses, (rows, numbers)."""
    losses = [nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in problem.data.source]
    found = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in torch.cat(losses)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in found])


def test_every_pass_over_the_data_gives_inputs_to_their_rows(problem):
    expected = row_gradients(problem, problem.model.module) / 4
    for _ in range(3):
        with problem.batches() as batches:
            records = [
                {name: g for r in b.layers(b.loss_gradient[None]) for name, g in r.explicit().items()} for b in batches
            ]
        got = torch.cat(
            [torch.cat([found[name][0].flatten(1) for name in problem.layout.names], 1) for found in records]
        )
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_second_moments_of_the_second_pass_are_of_the_right_rows(problem):
    gradients = row_gradients(problem, problem.model.module) / 4
    trace = registry.build("ekfac", fisher="empirical").lower(problem).exact("trace")
    assert trace == pytest.approx(4 * float(gradients.square().sum()), rel=1e-12)
