"""Covariances of outputs, against Jacobians in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.flop_counter import FlopCounterMode

from curvalg import (
    Diagonal,
    ExpressionError,
    Identity,
    LowRank,
    Problem,
    StaleError,
    block_diagonal,
    inverse,
    registry,
    restrict,
)
from curvalg.estimate import functional_variance

D = torch.float64
build = registry.build


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def dense():
    net = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    return net, lambda n, seed: (random(n, 9, seed=seed), torch.arange(n) % 3)


def images():
    layers = [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2, stride=2), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers), lambda n, seed: (random(n, 2, 6, 6, seed=seed), torch.arange(n) % 3)


class Tied(nn.Module):
    """A layer that is used twice, and a normalisation."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.mix(torch.tanh(self.mix(x))))))


def tied():
    return Tied(), lambda n, seed: (random(n, 5, seed=seed), torch.arange(n) % 3)


MODELS = {"dense": dense, "images": images, "tied": tied}
MATRICES = {
    "kfac": lambda size: inverse(build("kfac") + 0.1 * Identity),
    "kfac apart": lambda size: inverse(build("kfac", joint=False) + 0.1 * Identity),
    "ekfac": lambda size: inverse(build("ekfac") + 0.1 * Identity),
    "ekfac itself": lambda size: build("ekfac"),
    "diagonal": lambda size: inverse(build("ggn_diagonal") + 0.1 * Identity),
    "low rank": lambda size: inverse(LowRank(random(size, 3)) + 0.1 * Identity),
    "given diagonal": lambda size: Diagonal(random(size).exp()),
    "blocks": lambda size: inverse(block_diagonal(build("ggn"), by="module") + 0.1 * Identity),
    "gram": lambda size: 2 * inverse(build("covariance") + 0.1 * Identity, solver="gram"),
    "centred gram": lambda size: inverse(build("centered_covariance") + 0.1 * Identity, solver="gram"),
    "dense": lambda size: inverse(build("ggn") + 0.1 * Identity, solver="dense"),
    "cg": lambda size: inverse(build("ggn") + 0.5 * Identity, solver="cg", rtol=1e-12),
    "identity": lambda size: 1.0 * Identity,
}


def jacobians(net, X, names=None):
    """Jacobians of the outputs of all rows (n, C, D), by torch.func alone."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    found = vmap(jacrev(lambda ps, x: functional_call(net, ps, (x[None],))[0].flatten()), (None, 0))(params, X)
    return torch.cat([found[name].flatten(2) for name in names or params], 2)


@pytest.fixture(params=MODELS)
def setting(request):
    torch.manual_seed(0)
    net, data = MODELS[request.param]()
    net = net.to(D)
    training = Problem(net, nn.CrossEntropyLoss(), [data(6, 1), data(4, 2)])
    X, _ = data(7, 3)
    return net, training, X


@pytest.mark.parametrize("name", MATRICES)
def test_variances_are_those_of_jacobians(setting, name):
    net, training, X = setting
    op = MATRICES[name](training.size).lower(training)
    found = functional_variance(op, Problem(net, None, [X[:4], X[4:]]))
    J = jacobians(net, X)
    expected = J @ op.to_dense() @ J.mT
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    variances = functional_variance(op, Problem(net, None, X), diagonal=True)
    torch.testing.assert_close(variances, expected.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=1e-9)


def test_the_training_problem_may_be_asked_itself():
    torch.manual_seed(0)
    net, data = dense()
    X, y = data(6, 0)
    problem = Problem(net.to(D), nn.CrossEntropyLoss(), (X, y))
    op = inverse(build("kfac") + 0.1 * Identity).lower(problem)
    J = jacobians(net, X)
    torch.testing.assert_close(functional_variance(op, problem), J @ op.to_dense() @ J.mT)


@pytest.mark.parametrize("way", ["problem", "expression"])
def test_some_parameters(way):
    torch.manual_seed(0)
    net, data = dense()
    net = net.to(D)
    chosen, asked = ("4.*", None) if way == "problem" else (None, "4.*")
    problem = Problem(net, nn.CrossEntropyLoss(), data(6, 0), params=chosen)
    ggn = build("ggn") if asked is None else restrict(build("ggn"), asked)
    op = inverse(ggn + 0.1 * Identity).lower(problem)
    X, _ = data(5, 1)
    J = jacobians(net, X, ("4.weight", "4.bias"))
    found = functional_variance(op, Problem(net, None, X, params=chosen))
    torch.testing.assert_close(found, J @ op.to_dense() @ J.mT)


def test_many_outputs_are_taken_some_at_a_time_and_keep_their_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 70), nn.Unflatten(1, (7, 10))).to(D)
    X = random(4, 3)
    problem = Problem(net, nn.MSELoss(), (X, torch.zeros(4, 7, 10, dtype=D)))
    op = Diagonal(random(problem.size).exp()).lower(problem)
    J = jacobians(net, X)
    expected = J @ op.to_dense() @ J.mT
    torch.testing.assert_close(functional_variance(op, problem), expected)
    torch.testing.assert_close(functional_variance(op, problem, diagonal=True), expected.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("name", ["gram", "kfac"])
def test_rows_of_jacobians_are_not_multiplied_by_the_operator(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 100), nn.Tanh(), nn.Linear(100, 60)).to(D)
    training = Problem(net, nn.MSELoss(), (random(50, 60), random(50, 60, seed=1)))
    op = MATRICES[name](training.size).lower(training).prepare()
    asked = Problem(net, None, random(20, 60, seed=2))
    functional_variance(op, asked)  # verifies and factorises
    counter = FlopCounterMode(display=False)
    with counter:
        functional_variance(op, asked)
    rows, columns = 20 * 60, 50
    assert counter.get_total_flops() < 2 * rows * columns * training.size


def test_refusals():
    torch.manual_seed(0)
    net, data = dense()
    problem = Problem(net.to(D), nn.CrossEntropyLoss(), data(6, 0))
    other = Problem(nn.Linear(9, 3).to(D), None, data(6, 0)[0])
    op = inverse(build("kfac") + 0.1 * Identity).lower(problem)
    with pytest.raises(ExpressionError, match="expected a problem that has the 6 parameters"):
        functional_variance(op, other)
    with pytest.raises(ExpressionError, match="expected a Problem, got Tensor"):
        functional_variance(op, data(6, 0)[0])
    with pytest.raises(ExpressionError, match="square operator on parameters"):
        functional_variance(build("jacobian").lower(problem), problem)
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(StaleError):
        functional_variance(op, Problem(net, None, data(6, 0)[0]))
