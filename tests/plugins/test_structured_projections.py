"""Projections by structured random matrices are those of the dense matrices that they stand for, and without bias."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from torch import nn

from curvalg import Identity, OptionError, Problem, inverse, registry
from curvalg.estimate import influence
from curvalg_plugins.projections import project_gradients, trak_scores
from curvalg_plugins.projections.hadamard_rows import HadamardRows, hadamard, transformed
from curvalg_plugins.projections.kronecker_signs import KroneckerSigns

KINDS = ("srht", "kronecker")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Mixed(nn.Module):
    """A table that is a head too, norms, attention, a convolution with groups, a matrix that lies inputs first, a packed one."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.conv, self.mix = nn.Conv1d(4, 6, 3, padding=1, groups=2), nn.Linear(6, 4)
        self.matrix, self.packed = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(8, 4))

    def forward(self, words):
        h = self.norm(self.table(words))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = torch.tanh(self.mix(torch.tanh(self.conv(h.mT).mT)) @ self.matrix)
        first, second = self.packed.chunk(2)
        h = torch.tanh(h @ first.T) @ second.T
        return (h @ self.table.weight.T).mean(1)


def dense():
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return net, random(6, 5), torch.arange(6) % 3


def images():
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.ConvTranspose2d(3, 3, 2), nn.Flatten(), nn.Linear(48, 3))
    return net, random(6, 2, 4, 4), torch.arange(6) % 3


def mixed():
    words = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(0))
    return Mixed(), words, torch.arange(6) % 7


WORLDS = {"dense": dense, "images": images, "mixed": mixed}


def world(name):
    torch.manual_seed(0)
    net, X, y = WORLDS[name]()
    net = net.double()

    rows = []
    for n in range(len(X)):
        value = nn.functional.cross_entropy(net(X[n : n + 1]), y[n : n + 1])
        found = torch.autograd.grad(value, list(net.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    gradients = torch.stack(rows)
    return Problem(net, nn.CrossEntropyLoss(), [(X[:4], y[:4]), (X[4:], y[4:])]), gradients


def hadamard_matrix(layout, k, seed):
    """P (D, k) from the textbook transform."""
    made = HadamardRows(layout, k, seed)
    size = 2 ** math.ceil(math.log2(layout.size))
    H = torch.from_numpy(scipy.linalg.hadamard(size)).double()
    return (H[made._rows][:, : layout.size] * made._signs).T / k**0.5


def kronecker_matrix(layout, k, seed):
    """P (D, k) from Kronecker products, parameter by parameter."""
    made, like, rows = KroneckerSigns(layout, k, seed), torch.zeros(1).double(), []
    for name in layout.names:
        factors = made._signs(name, like)
        rows.append(factors[0].T if len(factors) == 1 else torch.kron(*factors).T)
        assert rows[-1].shape == (layout.shapes[name].numel(), k)
    return torch.cat(rows) / k**0.5


MATRICES = {"srht": hadamard_matrix, "kronecker": kronecker_matrix}


@pytest.mark.parametrize("k", [1, 6, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WORLDS)
def test_projections_are_those_of_the_dense_matrix(name, kind, k):
    problem, G = world(name)
    P = MATRICES[kind](problem.layout, k, 3)
    assert torch.allclose(P.abs(), torch.full_like(P, k**-0.5))
    found = project_gradients(problem, k, kind=kind, seed=3)
    assert found.shape == (6, k)
    assert (found - G @ P).norm() <= 1e-12 * (G @ P).norm()
    assert not torch.equal(found, project_gradients(problem, k, kind=kind, seed=4))


@pytest.mark.parametrize("bits", [0, 1, 3, 6, 7, 13])
def test_transforms_of_integers_are_exact(bits):
    x = torch.randint(-9, 9, (3, 2**bits), generator=torch.Generator().manual_seed(0)).float()
    H = torch.from_numpy(scipy.linalg.hadamard(2**bits)).float()
    assert torch.equal(transformed(x), x @ H)
    assert torch.equal(hadamard(2**bits, x), H)


@pytest.mark.parametrize("k", [4, 12])
@pytest.mark.parametrize("kind", ["dense", *KINDS])
@pytest.mark.parametrize("name", ["dense", "mixed"])
def test_inner_products_are_without_bias(name, kind, k):
    """Over many seeds, within four standard errors."""
    problem, G = world(name)
    layout = problem.layout
    seeds = 200 if kind == "dense" else 600
    if kind == "dense":
        samples = [project_gradients(problem, k, seed=seed) for seed in range(seeds)]
    else:  # by the matrices that the functions are compared with above
        samples = [G @ MATRICES[kind](layout, k, seed) for seed in range(seeds)]
    products = torch.stack([phi @ phi.T for phi in samples])
    error = (products.mean(0) - G @ G.T).abs()
    assert bool((error <= 4 * products.std(0) / seeds**0.5 + 1e-12).all())


@pytest.mark.parametrize("flat", [False, True])
def test_the_spread_is_as_stated(flat):
    """Of a layer of one position, whose gradients are outer products; flat ones are one row of the Hadamard matrix."""
    net = nn.Linear(40, 30, bias=False).double()
    X, y = random(2, 40), random(2, 30, seed=1)
    if flat:
        net, X = nn.Linear(64, 32, bias=False).double(), torch.ones(2, 64).double()
        y = net(X).detach() - 1
    problem = Problem(net, nn.MSELoss(reduction="sum"), (X, y))
    G = (2 * (net(X) - y).detach()[:, :, None] * X[:, None]).flatten(1)
    scale = G.norm(dim=1).outer(G.norm(dim=1))
    for kind, expected in (("srht", (2 / 64) ** 0.5), ("kronecker", (2 / 8 + 2 / 8 + 4 / 64) ** 0.5)):
        products = torch.stack([(p := project_gradients(problem, 64, kind=kind, seed=s)) @ p.T for s in range(150)])
        assert bool((products.std(0) <= 1.3 * expected * scale).all())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_formula(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    problem, queries = (
        Problem(net, nn.CrossEntropyLoss(), (random(n, 3, seed=n), torch.arange(n) % 3)) for n in (60, 7)
    )
    phi, psi = (project_gradients(p, 16, kind=kind, seed=2) for p in (problem, queries))
    kernel = phi.T @ phi + 2 * torch.eye(16).double()
    scores = trak_scores(problem, queries, 16, damping=2, kind=kind, seed=2)
    assert torch.allclose(scores, psi @ torch.linalg.solve(kernel, phi.T))


def test_all_entries_of_the_transform_are_exact():
    """The matrix is orthogonal then."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    problem, queries = (
        Problem(net, nn.CrossEntropyLoss(), (random(n, 3, seed=n), torch.arange(n) % 3)) for n in (60, 7)
    )
    exact = influence(inverse(registry.build("covariance") + 2 / 60 * Identity).lower(problem), queries).scores
    assert torch.allclose(trak_scores(problem, queries, 32, damping=2, kind="srht"), exact, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_and_reductions(kind):
    net = nn.Linear(3, 4).double()
    X, y = random(5, 6, 3), torch.arange(30).reshape(5, 6) % 4
    loss = nn.CrossEntropyLoss()

    def forward(model, batch):
        return model(batch[0]).movedim(-1, 1)

    tokens = project_gradients(Problem(net, loss, (X, y), forward=forward, samples="position"), 11, kind=kind)
    rows = project_gradients(Problem(net, loss, (X.flatten(0, 1), y.flatten())), 11, kind=kind)
    assert torch.allclose(tokens, rows, atol=1e-12)
    summed = Problem(net, nn.CrossEntropyLoss(reduction="sum"), (X.flatten(0, 1), y.flatten()))
    assert torch.allclose(project_gradients(summed, 11, kind=kind), rows, atol=1e-12)


def test_what_makes_no_sense_is_named():
    problem, _ = world("dense")
    for call, message in (
        (
            lambda: project_gradients(problem, 3, kind="sparse"),
            "kind to be one of 'dense', 'srht', 'kronecker', got 'sparse'",
        ),
        (lambda: trak_scores(problem, problem, 3, kind=None), "kind to be one of"),
        (lambda: project_gradients(problem, 65, kind="srht"), "keeps some of 64 numbers, the next power of two of 39"),
    ):
        with pytest.raises(OptionError, match=message):
            call()
    assert project_gradients(problem, 64, kind="srht").shape == (6, 64)
