"""Layers whose inputs are not the rows of the batch as they come: folded positions, routed rows, products from the right."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvalg import Identity, Problem, inverse, registry

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
LAYERED = ["ggn", "covariance", "ggn_diagonal", "covariance_diagonal", "kfac", "ekfac"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def dense(term, problem):
    return registry.build(term).lower(problem).to_dense()


def rows_of_jacobian(model, x):
    z = model(x)
    params = list(model.parameters())
    rows = [torch.autograd.grad(e, params, retain_graph=True, allow_unused=True) for e in z.reshape(-1)]
    flat = [torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(r, params)]) for r in rows]
    return torch.stack(flat).reshape(*z.shape, -1)


class Folded(nn.Module):
    """Positions become rows: of the output, or before a layer."""

    def __init__(self, early):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.shift = nn.Parameter(torch.randn(1, 6, 4))
        self.inner, self.out, self.early = nn.Linear(4, 5), nn.Linear(5, 3), early

    def forward(self, tokens):
        h = self.norm(self.embed(tokens) + self.shift)
        h = h.flatten(0, 1) if self.early else h
        return self.out(torch.tanh(self.inner(h))).reshape(-1, 3)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("term", LAYERED)
def test_folded_positions(term, early):
    model = Folded(early).double()
    tokens, y = torch.randint(0, 7, (4, 6)), torch.randint(0, 3, (24,))

    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, tokens):
            return self.inner(tokens).reshape(4, 6, 3).movedim(-1, 1)

    options = {"rest": "diagonal"} if "kfac" in term else {}
    folded = registry.build(term, **options).lower(Problem(model, CE, (tokens, y)))
    kept = registry.build(term, **options).lower(Problem(Kept(), CE, (tokens, y.reshape(4, 6)), samples="position"))
    if "kfac" in term:  # which parameters have factors may differ: compare those of linear layers
        names = ["inner.weight", "out.weight"]
        for name in names:
            a, b = folded.problem.layout.slices[name], kept.problem.layout.slices[f"inner.{name}"]
            assert torch.allclose(folded.to_dense()[a, a], kept.to_dense()[b, b], atol=1e-10)
    else:
        assert torch.allclose(folded.to_dense(), kept.to_dense(), atol=1e-10)


class Conv1D(nn.Module):
    """h W + b with W (in, out), as GPT-2 writes it."""

    def __init__(self, inputs, outputs, how):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))
        self.how = how

    def forward(self, x):
        if self.how == "addmm":
            return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
        return {"matmul": torch.matmul, "@": lambda a, b: a @ b, "mm": torch.mm}[self.how](x, self.weight) + self.bias


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("how", ["addmm", "matmul", "@", "mm"])
@pytest.mark.parametrize("term", LAYERED)
def test_products_from_the_right(term, how, joint):
    if joint and how != "addmm" and "kfac" in term:
        pytest.skip("the bias is added by another function: a parameter of its own")
    right, left = Conv1D(4, 5, how).double(), nn.Linear(4, 5).double()
    left.weight.data, left.bias.data = right.weight.data.T.contiguous(), right.bias.data.clone()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 5).double()
    options = {"joint": joint, "rest": "exact"} if "kfac" in term else {}
    a, b = (registry.build(term, **options).lower(Problem(m, MSE, (x, y))) for m in (right, left))
    order = torch.cat([torch.arange(20).reshape(5, 4).T.reshape(-1), torch.arange(20, 25)])
    A, B = a.to_dense(), b.to_dense()
    if "kfac" in term and how != "addmm":
        A, B, order = A[:20, :20], B[:20, :20], order[:20]
    assert torch.allclose(A, B[order][:, order], atol=1e-10)


class Experts(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(count)])

    def forward(self, x):
        chosen = (x[:, 0] > 0).long() + (x[:, 0] > 0.8).long()
        out = x.new_zeros(len(x), 2)
        for k, expert in enumerate(self.experts):
            if (chosen == k).any():
                out[chosen == k] = expert(x[chosen == k])
        return out


def routed(sizes):
    """Batches; the first reaches one expert alone."""
    xs = [torch.randn(n, 3).double() for n in sizes]
    xs[0][:, 0] = xs[0][:, 0].abs() * 0.5 + 1e-3
    xs[0][:, 0].clamp_(max=0.7)
    return [(x, torch.randn(len(x), 2).double()) for x in xs]


@pytest.mark.parametrize("term", LAYERED)
def test_routed_rows_and_experts_without_rows(term):
    model, batches = Experts().double(), routed([4, 7, 5])
    whole = [tuple(torch.cat(parts) for parts in zip(*batches))]
    split, one = (dense(term, Problem(model, MSE, data)) for data in (batches, whole))
    assert torch.allclose(split, one, atol=1e-10)
    if term in ("ggn", "covariance"):
        x, y = whole[0]
        J, r = rows_of_jacobian(model, x), (model(x) - y).detach()
        expected = torch.einsum("ncd,nce->de", J, J) / r.numel() * 2
        per_sample = torch.einsum("nc,ncd->nd", r, J) * 2 / 2
        assert torch.allclose(one, expected if term == "ggn" else per_sample.T @ per_sample / len(x), atol=1e-10)


def test_the_factors_of_an_expert_are_those_of_its_rows():
    model, batches = Experts().double(), routed([4, 7, 5])
    problem = Problem(model, MSE, batches)
    got = dense("kfac", problem)
    x = torch.cat([x for x, _ in batches])
    chosen = (x[:, 0] > 0).long() + (x[:, 0] > 0.8).long()
    for k in range(3):
        h, first = x[chosen == k], model.experts[k][0]
        own = torch.cat([h, torch.ones(len(h), 1).double()], 1)
        A = own.T @ own / len(h)
        a = torch.tanh(first(h)).detach()
        W = model.experts[k][2].weight.detach()
        deltas = torch.einsum("co,no->nco", W, 1 - a * a).reshape(-1, 4) * (2 / (2 * len(x))) ** 0.5
        B = deltas.T @ deltas
        weight = problem.layout.slices[f"experts.{k}.0.weight"]
        assert torch.allclose(got[weight, weight], torch.kron(B, A[:3, :3]), atol=1e-10)


def test_an_expert_that_is_never_used_has_a_block_of_zeros():
    model = Experts(4).double()
    problem = Problem(model, MSE, routed([4, 6]))
    op = registry.build("kfac").lower(problem)
    unused = problem.layout.slices["experts.3.0.weight"]
    assert not op.to_dense()[unused].any()
    v = torch.randn(problem.size).double()
    step = inverse(registry.build("kfac") + 0.1 * Identity).lower(problem) @ v
    assert torch.allclose((op.to_dense() + 0.1 * torch.eye(problem.size).double()) @ step, v, atol=1e-8)


def test_positions_that_see_each_other_are_still_right():
    """Folded rows of attention are not rows of a layer: the gradients of single rows are multiplied out instead."""

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.inner(x)
            h = torch.softmax(h @ h.mT, -1) @ h
            return self.out(h).reshape(-1, 3)

    model = Attends().double()
    x, y = torch.randn(3, 4, 4).double(), torch.randint(0, 3, (12,))
    J = rows_of_jacobian(model, x)
    r = (torch.softmax(model(x), 1) - F.one_hot(y, 3)).detach()
    g = torch.einsum("nc,ncd->nd", r, J)
    assert torch.allclose(dense("covariance", Problem(model, CE, (x, y))), g.T @ g / 12, atol=1e-10)
    assert torch.allclose(
        dense("covariance_diagonal", Problem(model, CE, (x, y))).diagonal(), g.square().mean(0), atol=1e-10
    )
