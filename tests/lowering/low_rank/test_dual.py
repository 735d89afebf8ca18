"""The dual form: columns of Gauss-Newton terms, their Gram matrix under any budget, and what is kept of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from curvalg import FactsError, Identity, Problem, inverse, losses, registry, sqrt
from curvalg.lowering.low_rank import factor_of
from tests.support.zoo import make

TERMS = ["ggn", "ggn_mc", "fisher", "fisher_mc", "covariance", "centered_covariance"]
X = torch.randn(7, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class MeanVariance(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        out = self.layer(x)
        return out[:, :2], nn.functional.softplus(out[:, 2:])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _labels(*shape):
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(4))


def _targets(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def worlds():
    """Problems with losses of every shape: by position and row, weighted, ignored, with a Fisher unlike the GGN."""
    X3 = X.reshape(7, 1, 4).repeat(1, 2, 1) + _targets(7, 2, 4)
    weights = torch.tensor([1.0, 2.0, 0.5]).double()
    ragged = [(X[:4], torch.tensor([0, 1, 2, 0])), (X[4:], torch.tensor([1, -100, 2]))]
    return {
        "classes, ragged, weighted, ignored": (Problem(net(), nn.CrossEntropyLoss(weight=weights), ragged), TERMS),
        "sum of squares": (Problem(net(), nn.MSELoss(reduction="sum"), (X, _targets(7, 3))), TERMS),
        "positions in rows": (Problem(net(), losses.CrossEntropy(class_axis=-1), (X3, _labels(7, 2))), TERMS),
        "positions as samples": (
            Problem(net(), losses.CrossEntropy(class_axis=-1), (X3, _labels(7, 2)), samples="position"),
            TERMS,
        ),
        "elements as samples": (Problem(net(), nn.MSELoss(), (X3, _targets(7, 2, 3)), samples="element"), TERMS),
        "vectors as samples": (Problem(net(), nn.MSELoss(), (X3, _targets(7, 2, 3)), samples="position"), TERMS),
        "a callable": (
            Problem(net(), lambda z, y: (z - y).cosh().mean(), (X, _targets(7, 3)), reduction="mean"),
            ["covariance", "centered_covariance", "ggn_mc"],
        ),
        "mean and variance": (
            Problem(MeanVariance().double(), nn.GaussianNLLLoss(), (X, _targets(7, 2))),
            ["fisher", "fisher_mc", "covariance"],
        ),
        "poisson": (
            Problem(
                nn.Sequential(net(), nn.Softplus()), nn.PoissonNLLLoss(log_input=False), (X, _labels(7, 3).double())
            ),
            TERMS,
        ),
    }


WORLDS = worlds()


@pytest.mark.parametrize(("world", "name"), [(w, t) for w, (_, terms) in WORLDS.items() for t in terms])
def test_columns_make_the_matrix(world, name):
    problem, term = WORLDS[world][0], registry.build(name)
    dense = term.lower(problem).to_dense()
    snapshot = problem.snapshot()
    with problem.differentiating():
        factor = factor_of(problem, snapshot, (term,))
        factor.prepare(problem, snapshot)
        assert problem.factor_columns(term) * problem.totals.rows == factor.size
        V = factor.pull(problem, snapshot, torch.eye(factor.size).double())
        assert torch.allclose(factor.push(problem, snapshot, torch.eye(problem.size).double()), V.T, atol=1e-12)
        assert torch.allclose(factor.gram(problem, snapshot), V.T @ V, atol=1e-12)
    middle = torch.eye(factor.size).double()
    if term.centred:
        ones = factor.active.double()
        middle -= torch.outer(ones, ones) / problem.num_samples
    assert (V @ middle @ V.T - dense).norm() <= 1e-10 * dense.norm()


@pytest.mark.parametrize(("world", "name"), [(w, t) for w, (_, terms) in WORLDS.items() for t in terms])
def test_solves_and_spectra(world, name):
    problem, term = WORLDS[world][0], registry.build(name)
    dense = term.lower(problem).to_dense()
    damped = dense + 0.01 * torch.eye(problem.size).double()
    B = torch.randn(problem.size, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    columns = problem.factor_columns(term) * problem.totals.rows
    op = inverse(term + 0.01 * Identity).lower(problem)
    assert torch.allclose(op @ B, torch.linalg.solve(damped, B), atol=1e-7)
    chosen = "gram" if columns < problem.size else "dense"
    if term.facts(problem.facts).psd:
        assert f"{chosen}: chosen" in op.explain()
    root = torch.linalg.cholesky(damped).logdet() * 2
    assert math.isclose((term + 0.01 * Identity).lower(problem).exact("logdet"), root, rel_tol=1e-9)


@pytest.mark.parametrize("budget", [0, 400, 3000, 20000])
def test_any_budget_gives_the_same_numbers(budget, problem_of, dense_of, vectors, monkeypatch, inside):
    """Gram matrices group by group; products through the model where inputs and deltas are not kept."""
    inside(workspace=600)
    dense = dense_of("cnn")
    problem = problem_of("cnn", cache=max(budget, 0))
    expr = registry.build("covariance") + registry.build("centered_covariance") / 2
    snapshot = problem.snapshot()
    terms = tuple(sorted((registry.build("covariance"), registry.build("centered_covariance")), key=repr))
    expected = dense.covariance + dense.centered_covariance / 2 + 0.1 * torch.eye(dense.D).double()
    V = vectors(dense.D, 2)
    with problem.differentiating():
        factor = factor_of(problem, snapshot, terms)
        gram = factor.gram(problem, snapshot)
        W = factor.pull(problem, snapshot, torch.eye(factor.size).double())
        assert torch.allclose(gram, W.T @ W, atol=1e-12)
        assert factor.nbytes <= budget
        x = factor.push(problem, snapshot, V)
        assert torch.allclose(x, W.T @ V, atol=1e-12)
    monkeypatch.undo()
    assert torch.allclose(inverse(expr + 0.1 * Identity).lower(problem) @ V, torch.linalg.solve(expected, V), atol=1e-8)


def test_another_damping_needs_no_model(counted_model, vectors):
    problem, calls = counted_model("mlp")
    B = vectors(problem.size)
    ggn = registry.build("ggn")
    inverse(ggn + 0.1 * Identity).lower(problem) @ B
    before = calls()
    for damping in (0.2, 0.3):
        inverse(5 * ggn + damping * Identity).lower(problem) @ B
    (ggn + 0.4 * Identity).lower(problem).exact("logdet")
    sqrt(ggn + 0.5 * Identity).lower(problem) @ B
    assert calls() == before


def test_a_little_damping_in_single_precision(problem_of):
    """A gradient as right-hand side is in the range of V, where no digits cancel."""
    case = make("mlp")
    batches = [(x.float(), y) for x, y in case.batches]
    problem = Problem(case.model.float(), case.loss, batches)
    ggn = registry.build("covariance")
    g = problem.gradient()
    for damping in (1e-2, 1e-4, 1e-6):
        op = inverse(ggn + damping * Identity, rtol=1e-4).lower(problem)
        x = op @ g
        residual = ggn.lower(problem) @ x + damping * x - g
        assert residual.norm() <= 1e-4 * g.norm()
        assert "gram: chosen" in op.explain()


def test_why_the_dual_form_declines(problem_of):
    def reason(expr, problem):
        text = inverse(expr + Identity, on_fail="warn").lower(problem).explain()
        return next(line for line in text.splitlines() if "gram: declined" in line)

    problem = problem_of("mlp")
    build = registry.build
    assert "hessian is not of the form V Vᵀ" in reason(build("hessian"), problem)
    assert "coefficient of ggn is not positive" in reason(build("covariance") - build("ggn"), problem)
    assert "M = 49 columns are not fewer than D = 43" in reason(build("ggn_mc", samples=7), problem)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, _labels(7)), batch_size=3, shuffle=True)
    assert "the loader shuffles" in reason(build("ggn"), Problem(net(), nn.CrossEntropyLoss(), loader))
    assert "not known to be positive semi-definite" in reason(build("ggn"), WORLDS["a callable"][0])
    small = problem_of("mlp", cache=1000)
    assert "M = 14 columns needs 1.53 KiB of a budget of 0.977 KiB" in reason(build("ggn"), small)
    with pytest.raises(FactsError, match=r"rank is at most M = 7"):
        inverse(build("covariance")).lower(problem)
