"""Losses in which samples see each other are refused, with two ways that work; both give the matrix of the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg import LossError, Problem, registry


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Y = torch.tensor([0, 0, 1, 1, 2, 2])
PARTNER = torch.tensor([1, 0, 3, 2, 5, 4])


def similarities(z):
    z = F.normalize(z, dim=1)
    return z @ z.T / 0.5 - 1e3 * torch.eye(len(z), dtype=z.dtype)


def contrastive(z, y):
    return F.cross_entropy(similarities(z), y)


def triplet(z, y):
    d = (z[:, None] - z[None]).square().sum(2)
    same = y[:, None] == y[None]
    chosen = same[:, :, None] & ~same[:, None, :]
    return F.softplus(d[:, :, None] - d[:, None, :])[chosen].sum() / 48


LOSSES = {"contrastive": (contrastive, PARTNER), "triplet": (triplet, Y)}


def hessian(model, fn, batches):
    """By double backward, of the mean over batches."""
    params = list(model.parameters())
    value = sum(fn(model(X), y) for X, y in batches) / len(batches)
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(value, params, create_graph=True)])
    rows = [torch.autograd.grad(e, params, retain_graph=True) for e in g]
    return torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in rows])


def embedding():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("reduction", [None, "mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_they_are_refused_with_the_cure(name, reduction):
    fn, y = LOSSES[name]
    with pytest.raises(LossError, match=r"contrastive, triplet.*matrix of similarities.*or make the batch one row"):
        _ = Problem(embedding(), fn, [(random(6, 3), y)], reduction=reduction).value()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_as_one_row(name, count):
    fn, y = LOSSES[name]
    model, batches = embedding(), [(random(6, 3, seed=i), y) for i in range(count)]
    problem = Problem(
        model,
        lambda z, t: (
            fn(z[0], t[0]) if len(z) == 1 else torch.stack([fn(a, b) for a, b in zip(z, t, strict=True)]).mean()
        ),
        batches,
        forward=lambda model, batch: model(batch[0])[None],
        target=lambda batch: batch[1][None],
        reduction="mean",
    )
    H, v = hessian(model, fn, batches), random(problem.size, 2)
    assert problem.num_samples == count
    assert (registry.build("hessian").lower(problem) @ v - H @ v).norm() <= 1e-10 * (H @ v).norm()


@pytest.mark.parametrize("count", [1, 2])
def test_the_matrix_of_similarities_as_output(count):
    model, batches = embedding(), [(random(6, 3, seed=i), PARTNER) for i in range(count)]
    problem = Problem(model, nn.CrossEntropyLoss(), batches, forward=lambda model, batch: similarities(model(batch[0])))
    H, v = hessian(model, contrastive, batches), random(problem.size, 2)
    assert problem.num_samples == 6 * count
    assert (registry.build("hessian").lower(problem) @ v - H @ v).norm() <= 1e-10 * (H @ v).norm()
    params = list(model.parameters())
    each = [
        torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss, params, retain_graph=True)])
        for X, y in batches
        for loss in F.cross_entropy(similarities(model(X)), y, reduction="none")
    ]
    g = torch.stack(each)
    U = g.T @ (g @ v) / len(g)
    for factored in (True, False):
        problem.factored = factored
        assert (registry.build("covariance").lower(problem) @ v - U).norm() <= 1e-10 * U.norm()
