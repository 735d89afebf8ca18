"""Problems of single layers, and every question that their records answer, against the Jacobian."""

from __future__ import annotations

import torch
from torch import nn

from curvalg import Problem, registry
from curvalg.problem.layers import record_layers

D = torch.float64
MANY = 200
"""Directions."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


class Lambda(nn.Module):
    """Layers and a function of them."""

    def __init__(self, function, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def param(*shape):
    return nn.Parameter(random(*shape, seed=3))


TOKENS = torch.randint(0, 6, (5, 4), generator=torch.Generator().manual_seed(2))
"""Six words in five rows of four."""


def single(name, builders):
    torch.manual_seed(0)
    model, X = builders[name]()
    model = model.to(D)
    if name == "bias alone is chosen":
        model.bias.requires_grad_(True)
    with torch.no_grad():
        rows = model(X).shape[1:]
    batches = [(X, random(len(X), *rows)), (X.flip(0), random(len(X), *rows))]
    return Problem(model, nn.MSELoss(), batches)


def check(problem, columns=3):
    """Every question of every record against Jacobian rows contracted with the cotangents."""
    J = registry.build("jacobian").lower(problem).to_dense()
    names, snapshot = problem.layout.names, problem.snapshot()
    found, at = [], 0
    with problem.differentiating():
        for evaluation in problem.evaluations(snapshot, order_matters=True):
            recorded = record_layers(evaluation)
            z = recorded.batch.output
            n, size = z.shape[0], z.numel()
            S = random(columns, *z.shape, seed=5)
            records = recorded.records(S)
            rows = J[at : at + size].reshape(n, -1, J.shape[1])
            at += size
            G = torch.einsum("nod,kno->knd", rows, S.reshape(columns, n, -1))
            assert sorted(p for r in records for p in r.params) == sorted(names)
            assert all((r.columns, r.rows) == (columns, n) for r in records)
            close(_joined(problem, [r.explicit() for r in records], 2), G)
            V, W = random(2, problem.size), random(2, columns, n)
            directions = problem.layout.unflatten_rows(V)
            close(sum(r.project(directions) for r in records), torch.einsum("pd,knd->pkn", V, G))
            half = slice(n // 2, n)
            close(_joined(problem, [r.explicit(half) for r in records], 2), G[:, half])
            many = random(MANY, problem.size, seed=7)  # so many that gradients may be multiplied out first
            rows_of = problem.layout.unflatten_rows(many)
            close(sum(r.project(rows_of) for r in records), torch.einsum("pd,knd->pkn", many, G))
            at_positions = [r.project_positions(directions) for r in records]
            close(sum(p.sum(3) for p in at_positions), torch.einsum("pd,knd->pkn", V, G))
            close(_joined(problem, [r.combine(W) for r in records], 1), torch.einsum("pkn,knd->pd", W, G))
            close(_joined(problem, [r.squares() for r in records], 0), G.square().sum((0, 1)))
            close(torch.stack([r.square_norms() for r in records]).sum(0), G.square().sum(2))
            for record in records:
                each = record.project_each(directions)
                close(sum(each.values()), record.project(directions))
                one = record.combine_each(dict.fromkeys(record.params, W))
                assert all(torch.allclose(one[p], record.combine(W)[p], atol=1e-12) for p in record.params)
                for p in record.params:
                    alone = record.select([p])
                    close(alone.project(directions), each[p])
                    assert alone.params == (p,)
                assert record.select(["none"]) is None
            found.append((records, G))
    first, G = found[0]
    for others, H in (found[0], found[-1]):
        by = {r.params: r for r in others}
        close(sum(r.gram(by[r.params]) for r in first), torch.einsum("knd,lmd->knlm", G, H))
        parts = [p for r in first for p in r.params]
        close(
            sum(a.gram(b) for p in parts for a in [_of(first, p)] for b in [_of(others, p)]),
            torch.einsum("knd,lmd->knlm", G, H),
        )


def _of(records, param):
    return next(part for r in records if (part := r.select([param])) is not None)


def _joined(problem, dicts, lead):
    every = {name: t for d in dicts for name, t in d.items()}
    return torch.cat(
        [
            every[name].flatten(lead) if lead < every[name].ndim else every[name][..., None]
            for name in problem.layout.names
        ],
        lead,
    )


def close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 1e-10 * max(1.0, float(expected.norm()))
