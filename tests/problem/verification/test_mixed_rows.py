"""Models that mix the rows of a batch by hand: their gradients are right for the batches as they are, and it is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from curvalg import CurvalgWarning, Identity, Problem, estimate, inverse, registry
from curvalg_plugins.laplace import laplace

X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(12) % 2
WHERE = ["nowhere", "inputs", "inside", "outputs"]


class Centred(nn.Module):
    """A network that takes the mean over the batch off somewhere."""

    def __init__(self, where):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.where = nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), where

    def at(self, place, x):
        return x - x.mean(0) if self.where == place else x

    def forward(self, x):
        hidden = self.at("inside", torch.tanh(self.inner(self.at("inputs", x))))
        return self.at("outputs", self.outer(hidden))


def gradients(net, values):
    parts = [torch.autograd.grad(v, list(net.parameters()), retain_graph=True) for v in values]
    return torch.stack([torch.cat([g.reshape(-1) for g in part]) for part in parts])


def losses(net):
    return gradients(net, nn.functional.cross_entropy(net(X), Y, reduction="none"))


USES = {
    "influence": lambda op, p: estimate.influence(op, p.with_data((X, Y))).scores,
    "self_influence": lambda op, p: estimate.self_influence(op),
    "functional_variance": lambda op, p: estimate.functional_variance(op, p, diagonal=True),
    "laplace": lambda op, p: laplace(p).predict(X).mean,
}


def expected(use, net, op):
    g, z = losses(net), net(X)
    if use == "influence":
        return g @ op.to_dense() @ g.T / 12
    if use == "self_influence":
        return (g @ op.to_dense() * g).sum(1) / 12
    J = gradients(net, z.reshape(-1))
    return (J @ op.to_dense() * J).sum(1).reshape(12, 2)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("where", WHERE)
def test_mixed_rows_are_warned_of_once_and_gradients_stay_right(where, use):
    net = Centred(where)
    problem = Problem(net, nn.CrossEntropyLoss(), (X, Y))
    op = inverse(registry.build("ggn") + 0.1 * Identity).lower(problem)
    if where == "nowhere":
        found = USES[use](op, problem)
    else:
        with pytest.warns(CurvalgWarning, match="depends on the other rows of its batch"):
            found = USES[use](op, problem)
    if use != "laplace":
        torch.testing.assert_close(found, expected(use, net, op))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if use != "laplace":  # whose inputs are a problem of their own each time
            USES[use](op, problem)
        silent = Problem(net, nn.CrossEntropyLoss(), (X, Y), verify=False)
        USES[use](inverse(registry.build("ggn") + 0.1 * Identity).lower(silent), silent)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["covariance", "covariance_diagonal"])
def test_covariances_are_of_the_gradients_in_their_batch(name, where):
    net = Centred(where)
    found = registry.build(name).lower(Problem(net, nn.CrossEntropyLoss(), (X, Y))).to_dense()
    g = losses(net)
    wanted = g.T @ g / 12
    torch.testing.assert_close(found, wanted if name == "covariance" else wanted.diagonal().diag())


def test_models_of_one_size_of_batch_are_not_judged():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, x):
            return self.layer(x.reshape(12, 3))

    problem = Problem(Fixed(), nn.CrossEntropyLoss(), (X, Y))
    assert estimate.self_influence(inverse(registry.build("ggn") + 0.1 * Identity).lower(problem)).shape == (12,)
