"""Numbers of curvature by random probes: their gradients, and the error that they state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import CurvalgError, Problem, differentiable, registry

build = registry.build


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = [(torch.randn(n, 3).double(), torch.arange(n) % 3) for n in (4, 3)]
    return net, Problem(net, nn.CrossEntropyLoss(), data)


def probed(name, problem, damping, **options):
    if name == "tic":
        return differentiable.tic(problem, hessian=build("ggn"), damping=damping, **options)
    return getattr(differentiable, name)(build("ggn"), problem, damping=damping, **options)


PROBED = ["trace", "logdet", "tic"]


@pytest.mark.parametrize("name", ["trace", "tic"])
def test_gradients_by_probes_are_those_of_the_number_by_the_same_probes(name):
    net, problem = small()
    raw, params = torch.zeros(problem.size).double().requires_grad_(), list(net.parameters())
    leaves = [*params, raw]
    moves = [torch.randn_like(t) for t in leaves]

    def value(step=0.0):
        with torch.no_grad():
            for t, move in zip(leaves, moves, strict=True):
                t += step * move
        found = probed(name, problem, raw.exp(), probes=3, seed=2)
        with torch.no_grad():
            for t, move in zip(leaves, moves, strict=True):
                t -= step * move
        return found

    expected = float((value(1e-5) - value(-1e-5)).detach()) / 2e-5
    value().backward()
    parts = [float((t.grad * move).sum()) for t, move in zip(leaves, moves, strict=True)]
    assert sum(parts) == pytest.approx(expected, rel=1e-6)
    assert probed(name, problem, 1.0).error == 0.0


def test_gradients_of_logdet_by_probes_have_no_bias():
    """By solves, unlike the value, so that the gradient is not that of the number by the same probes."""
    net, problem = small()
    raw = torch.zeros(problem.size).double().requires_grad_()

    def gradients(**options):
        net.zero_grad()
        raw.grad = None
        value = probed("logdet", problem, raw.exp(), **options)
        value.backward()
        return value, torch.cat([p.grad.reshape(-1) for p in net.parameters()]), raw.grad.clone()

    exact, *expected = gradients()
    assert exact.error == 0.0
    found = [gradients(probes=150, seed=seed) for seed in range(8)]
    for number, wanted in enumerate(expected, 1):
        along = torch.stack([each[number] @ wanted for each in found]) / wanted.square().sum()
        spread = float(along.std()) / len(found) ** 0.5
        assert spread < 0.06
        assert abs(float(along.mean()) - 1) <= 4 * spread


@pytest.fixture(scope="module")
def wide():
    """A problem whose matrix is too large to be made by so few products, and too full for its Gram matrix."""
    torch.manual_seed(0)
    net = nn.Linear(40, 13).double()
    return Problem(net, nn.CrossEntropyLoss(), (torch.randn(60, 40).double(), torch.randint(13, (60,))))


@pytest.mark.parametrize("name", PROBED)
def test_numbers_by_probes_state_their_error(name, wide):
    """Errors in units of what is stated, over many seeds, are those of a normal distribution: around zero, of length one."""
    exact = float(probed(name, wide, 0.1).detach())
    found = [probed(name, wide, 0.1, probes=20, seed=seed) for seed in range(12)]
    assert all(value.error > 0.0 for value in found)
    scores = torch.tensor([(float(value.detach()) - exact) / value.error for value in found])
    assert float(scores.abs().max()) < 5
    assert float(scores.mean().abs()) < 4 / len(scores) ** 0.5
    assert 0.4 < float(scores.square().mean().sqrt()) < 2


def test_solves_of_a_singular_matrix_do_not_pass_for_numbers(wide):
    with pytest.raises(CurvalgError):
        differentiable.tic(wide, hessian=build("ggn"), probes=2)
