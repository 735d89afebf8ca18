"""What a sample is: a row, a position of a row, or a number; counted, and its gradients taken, accordingly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import LossError, Problem, registry
from curvalg.losses import CrossEntropy

N, T, C = 4, 3, 2


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Mixing(nn.Module):
    """Positions that see each other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, C)
        self.double()

    def forward(self, x):
        return self.last(self.first(x).tanh().cumsum(1))


LOSSES = {
    "mse": (nn.MSELoss(), lambda z, y: (z - y).square()),
    "mse, sum": (nn.MSELoss(reduction="sum"), lambda z, y: (z - y).square()),
    "huber": (nn.HuberLoss(delta=0.5), lambda z, y: nn.functional.huber_loss(z, y, reduction="none", delta=0.5)),
    "logits": (
        nn.BCEWithLogitsLoss(),
        lambda z, y: nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none"),
    ),
}
GRAINS = {"item": lambda e: e.flatten(1).sum(1), "position": lambda e: e.sum(2), "element": lambda e: e}


def gradients(model, losses):
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses.reshape(-1)]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


@pytest.mark.parametrize("samples", GRAINS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("factored", [True, False])
def test_covariances_of_vectors(name, samples, factored):
    loss, each = LOSSES[name]
    model, X, y = Mixing(), random(N, T, 3), random(N, T, C, seed=1)
    y = y.sigmoid() if name == "logits" else y
    problem = Problem(model, loss, [(X[:1], y[:1]), (X[1:], y[1:])], samples=samples, factored=factored)
    losses = GRAINS[samples](each(model(X), y))
    assert problem.num_samples == losses.numel()
    mean = loss.reduction == "mean"
    g = gradients(model, losses / (N * T * C if mean else 1))
    scale = losses.numel() if mean else 1
    v = random(problem.size, 2, seed=2)
    expected = scale * g.T @ (g @ v)
    assert (registry.build("covariance").lower(problem) @ v - expected).norm() <= 1e-10 * expected.norm()
    centred = expected - scale / losses.numel() * torch.outer(g.sum(0), g.sum(0)) @ v
    assert (registry.build("centered_covariance").lower(problem) @ v - centred).norm() <= 1e-10 * centred.norm()
    with problem.batches() as batches:
        rows = [batch.per_sample_gradients() for batch in batches]
    flat = torch.cat([torch.cat([row[k].flatten(1) for k in problem.layout.names], 1) for row in rows])
    assert (flat - g).norm() <= 1e-10 * g.norm()


@pytest.mark.parametrize("samples", GRAINS)
def test_the_gauss_newton_matrix_does_not_depend_on_it(samples):
    model, data = Mixing(), (random(N, T, 3), random(N, T, C, seed=1))
    v = random(sum(p.numel() for p in model.parameters()), seed=2)
    whole = registry.build("ggn").lower(Problem(model, nn.MSELoss(), data)) @ v
    got = registry.build("ggn").lower(Problem(model, nn.MSELoss(), data, samples=samples)) @ v
    assert (got - whole).norm() <= 1e-12 * whole.norm()
    exact = registry.build("kfac").lower(Problem(model, nn.MSELoss(), data)) @ v
    kfac = registry.build("kfac").lower(Problem(model, nn.MSELoss(), data, samples=samples)) @ v
    assert (kfac - exact).norm() <= 1e-12 * exact.norm()


def test_one_vector_for_each_row_is_the_row():
    model, data = nn.Linear(3, C).double(), (random(N, 3), random(N, C, seed=1))
    assert Problem(model, nn.MSELoss(), data, samples="position").num_samples == N
    assert Problem(model, nn.MSELoss(), data, samples="element").num_samples == N * C


def test_classes_are_no_elements():
    data = (random(N, T, 3), torch.zeros(N, T, dtype=torch.long))
    with pytest.raises(LossError, match=r"samples='element' is for losses.*CrossEntropy.*samples='position'"):
        Problem(Mixing(), CrossEntropy(class_axis=-1), data, samples="element")
