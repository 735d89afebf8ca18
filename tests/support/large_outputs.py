"""A language model whose outputs are large, and the same problem with and without chunks of them."""

from __future__ import annotations

import math

import torch
from torch import nn

from curvalg import Problem, registry
from curvalg.losses import CrossEntropy

V, B, T, D = 11, 3, 5, 4
build = registry.build
SUM = build("hessian") / 2 - 3 * build("ggn") + 0.25 * build("residual") + build("fisher")
POSITIONWISE = {
    "ggn": build("ggn"),
    "hessian": build("hessian"),
    "residual": build("residual"),
    "fisher": build("fisher"),
    "sum": SUM,
}


class Language(nn.Module):
    """A model of tokens with one mixing layer; what happens to the logits is up to ``after``."""

    def __init__(self, after=None, *, bias=True, tied=False, wide=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.norm = nn.Embedding(V, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.wide = None if wide is None else nn.Sequential(nn.Linear(D, wide), nn.GELU(), nn.Linear(wide, D))
        self.head = nn.Linear(D, V, bias=bias)
        if tied:
            self.head.weight = self.embed.weight
        self.after = after or (lambda z: z)
        self.double()

    def forward(self, tokens):
        h = self.norm(torch.tanh(self.mix(self.embed(tokens).cumsum(1))))
        return self.after(self.head(h if self.wide is None else h + self.wide(h)))


def tokens(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(sum(shape)))


LAST = CrossEntropy(class_axis=-1)


def data(cut=lambda y: y):
    """Two batches: B and 2·B rows would change unflatten, so both have B."""
    X = [tokens(B, T), tokens(T, B).T.contiguous()]
    y = [tokens(T, B).T.contiguous(), tokens(B, T).flip(0)]
    return [(x, cut(t)) for x, t in zip(X, y, strict=True)]


TWO = 6 * 8 * V * 2
"""Bytes in which two positions fit."""


def pair(model, loss, batches, **options):
    """The same problem in chunks of few positions, and with its outputs whole."""
    memory = options.pop("memory", TWO)
    return Problem(model, loss, batches, output_memory=memory, **options), Problem(
        model, loss, batches, output_memory=math.inf, **options
    )


def memory(cut):
    """As much, unless the outputs would fit in."""
    return TWO if 8 * V * cut(tokens(B, T)).numel() > TWO else 0


def vectors(problem, columns=1, size=None):
    drawn = torch.randn(size or problem.size, columns, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (drawn[:, 0] if columns == 1 else drawn).to(problem.dtype)


def agree(got, expected, tolerance=1e-12):
    assert (got - expected).norm() <= tolerance * expected.norm()


def chunked(op):
    return "in chunks of" in op.explain()


def compare(expr, chunks, whole, columns=1):
    op, reference = expr.lower(chunks), expr.lower(whole)
    v = vectors(chunks, columns, op.shape[1])
    expected = reference @ v
    for _ in range(2):
        agree(op @ v, expected)
    assert chunked(op) and not chunked(reference)


PROBABILITIES = torch.rand(2, B, T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
