"""Random projections keep inner products on average, and the scores of TRAK are those of its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from curvalg import FactsError, Identity, OptionError, Problem, inverse, registry
from curvalg.estimate import influence
from curvalg_plugins.projections import project_gradients, trak_scores

N, Q = 60, 7


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def world():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return net, *((random(n, 3, seed=n), torch.arange(n) % 3) for n in (N, Q))


def own_gradients(net, X, y, loss=nn.functional.cross_entropy):
    """Gradients of the samples' own losses (n, D) in plain torch."""

    def value(params, x, t):
        return loss(functional_call(net, params, (x[None],)), t[None])

    found = vmap(grad(value), (None, 0, 0))(dict(net.named_parameters()), X, y)
    return torch.cat([g.flatten(1) for g in found.values()], 1).detach()


@pytest.mark.parametrize("dimensions", [5, 64, 150])
def test_one_matrix_of_signs_projects_all_data(dimensions):
    """It is found from as many independent gradients as there are parameters, and gives the projections of others."""
    net, (X, _), (A, _) = world()
    targets = random(N, 3, seed=1), random(Q, 3, seed=2)
    loss = nn.MSELoss(reduction="sum")
    G, H = (own_gradients(net, x, t, loss) for x, t in zip((X, A), targets, strict=True))
    train, test = (
        project_gradients(Problem(net, loss, d), dimensions, seed=3) for d in zip((X, A), targets, strict=True)
    )
    P = torch.linalg.lstsq(G, train).solution
    assert torch.allclose(P.abs() * dimensions**0.5, torch.ones_like(P), atol=1e-6)
    assert torch.allclose(H @ P, test, rtol=1e-6, atol=1e-6)


def test_entries_are_signs():
    """A layer whose gradients are unit vectors shows the rows of P."""
    net = nn.Linear(4, 1, bias=False).double()
    problem = Problem(net, lambda z, t: z.sum(), (torch.eye(4).double(), torch.zeros(4, 1)))
    found = project_gradients(problem, 100)
    assert torch.equal(found.abs(), torch.full((4, 100), 0.1, dtype=torch.float64))
    assert 150 < int((found > 0).sum()) < 250
    assert not torch.equal(found, project_gradients(problem, 100, seed=1))


def test_inner_products_are_without_bias():
    net, train, _ = world()
    problem, G = Problem(net, nn.CrossEntropyLoss(), train), own_gradients(net, *train)
    samples = torch.stack([(P := project_gradients(problem, 8, seed=seed)) @ P.T for seed in range(400)])
    error = (samples.mean(0) - G @ G.T).abs()
    assert (error <= 5 * samples.std(0) / 20 + 1e-12).all()
    norms = G.norm(dim=1)
    assert (samples.std(0) <= 1.2 * (2 / 8) ** 0.5 * torch.outer(norms, norms)).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_and_reductions_change_nothing(reduction):
    net, (X, y), _ = world()
    loss = nn.CrossEntropyLoss(reduction=reduction)
    whole = project_gradients(Problem(net, loss, (X, y)), 9)
    parts = project_gradients(Problem(net, loss, [(X[:7], y[:7]), (X[7:], y[7:])]), 9)
    assert torch.allclose(whole, parts, atol=1e-12)
    assert torch.allclose(whole, project_gradients(Problem(net, nn.CrossEntropyLoss(), (X, y)), 9), atol=1e-12)


def test_positions_follow_each_other():
    net = nn.Linear(3, 4).double()
    X, y = random(5, 6, 3), torch.arange(30).reshape(5, 6) % 4
    loss = nn.CrossEntropyLoss()

    def forward(model, batch):
        return model(batch[0]).movedim(-1, 1)

    tokens = project_gradients(Problem(net, loss, (X, y), forward=forward, samples="position"), 11)
    rows = project_gradients(Problem(net, loss, (X.flatten(0, 1), y.flatten())), 11)
    assert torch.allclose(tokens, rows, atol=1e-12)


def test_as_many_dimensions_as_independent_gradients_are_exact():
    """An invertible projection leaves Φ (ΦᵀΦ)⁻¹ Φᵀ as it is: here of 16 parameters."""
    torch.manual_seed(0)
    net = nn.Linear(3, 4).double()
    loss, data = nn.MSELoss(reduction="sum"), [(random(n, 3, seed=n), random(n, 4, seed=n + 1)) for n in (N, Q)]
    problem, queries = (Problem(net, loss, d) for d in data)
    G, H = (own_gradients(net, *d, loss) for d in data)
    scores = trak_scores(problem, queries, 16)
    assert torch.allclose(scores, H @ torch.linalg.solve(G.T @ G, G.T), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("damping", [0.5, 20])
def test_scores_are_those_of_the_formula_and_tend_to_the_influence(damping):
    net, train, test = world()
    problem, queries = (Problem(net, nn.CrossEntropyLoss(), data) for data in (train, test))
    phi, psi = project_gradients(problem, 10, seed=2), project_gradients(queries, 10, seed=2)
    kernel = phi.T @ phi + damping * torch.eye(10).double()
    assert torch.allclose(
        trak_scores(problem, queries, 10, damping=damping, seed=2), psi @ torch.linalg.solve(kernel, phi.T)
    )
    exact = influence(inverse(registry.build("covariance") + damping / N * Identity).lower(problem), queries).scores
    errors = [(trak_scores(problem, queries, k, damping=damping) - exact).norm() / exact.norm() for k in (50, 5000)]
    assert errors[1] < 0.1
    assert errors[1] < 0.4 * errors[0]


def test_what_makes_no_sense_is_named():
    net, train, test = world()
    problem, queries = (Problem(net, nn.CrossEntropyLoss(), data) for data in (train, test))
    other = Problem(nn.Linear(3, 3).double(), nn.CrossEntropyLoss(), train)
    moved = Problem(world()[0].requires_grad_(True), nn.CrossEntropyLoss(), test)
    moved.step(moved.gradient())
    for call, message in (
        (lambda: project_gradients(problem, 0), "expected dimensions to be an integer ≥ 1, got 0"),
        (lambda: project_gradients(problem, 3, seed=True), "expected seed to be an integer ≥ 0"),
        (lambda: project_gradients(net, 3), "expected a curvalg.Problem, got Sequential"),
        (lambda: trak_scores(problem, queries, 3, damping=-1.0), "finite number of at least 0, got -1.0"),
        (lambda: trak_scores(problem, net, 3), "expected two problems, got Sequential"),
        (lambda: trak_scores(problem, other, 3), "expected queries of the same parameters"),
        (lambda: trak_scores(problem, moved, 3), "their values differ"),
    ):
        with pytest.raises(OptionError, match=message):
            call()
    with pytest.raises(FactsError, match="of 60 training samples is singular; raise damping="):
        trak_scores(problem, queries, 100)
