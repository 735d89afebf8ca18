"""Graphs that leave rows where they are, and all others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg.problem.layers import is_steady

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Custom(torch.autograd.Function):
    """What a user's function does with rows cannot be seen."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(0)

    @staticmethod
    def backward(ctx, g):
        return g.flip(0)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU())


@pytest.mark.parametrize(
    "model",
    [
        mlp(),
        nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv2d(1, 3, 2, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(3, 2),
        ),
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2), nn.LogSoftmax(1)),
        nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4).eval(), nn.SiLU()),
    ],
    ids=["mlp", "cnn", "layer norm", "batch norm"],
)
def test_plain_networks_are_steady(model):
    assert is_steady(model(X))


ROUTES = {
    "indexing": lambda h: h[h[:, 0].argsort()],
    "selection": lambda h: h.index_select(0, h[:, 0].argsort()),
    "gathering": lambda h: h.gather(0, h.argsort(0)),
    "sorting": lambda h: h.sort(0).values,
    "scattering": lambda h: torch.zeros(6, 4).index_copy(0, h[:, 0].argsort(), h),
    "a permutation matrix": lambda h: F.one_hot(h[:, 0].argsort(), 6).float() @ h,
    "an embedding": lambda h: F.embedding(h[:, 0].argsort(), h),
    "rolling": lambda h: h.roll(int(h[0, 0] > 0), 0),
    "slices put together": lambda h: torch.cat([h[2:], h[:2]]),
    "a function of the user": Custom.apply,
    "attention over rows": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "rows in other shapes": lambda h: h.reshape(3, 8),
    "swapped axes": lambda h: h.T,
    "a choice of the user": lambda h: torch.where(h[:, :1] > 0, h, h.flip(0)),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_whatever_can_move_rows_is_not(route):
    h = mlp()(X)
    assert is_steady(h)
    assert not is_steady(route(h) * 2.0)
    first = nn.Linear(4, 4)(X)
    moved = route(first)
    assert not is_steady(nn.Linear(moved.shape[-1], 3)(moved))
