"""Parameters that an exchange does not reach, calls that differ, losses that see more than the output: refused by name, or put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from curvalg import LossError, Problem, ProblemError, registry
from tests.support.small_net import MSE, Net, data

# -- parameters that are reached otherwise ----------------------------------------------------------------------------------


class ByClosure(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
        weight = self.first.weight
        self.kept = {"closure": lambda h: F.linear(h, weight), "list": [weight], "cached": weight.T}[keep]

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if callable(self.kept) and not isinstance(self.kept, torch.Tensor):
            return self.second(self.kept(h))
        return self.second(h @ (self.kept[0] if isinstance(self.kept, list) else self.kept))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("keep", ["closure", "list", "cached"])
@pytest.mark.parametrize("what", ["gradient", "hessian", "ggn", "covariance", "kfac", "jacobian"])
def test_parameters_that_an_exchange_does_not_reach_are_refused(what, keep, frozen):
    model = ByClosure(keep)
    x, y = data()
    params = "first.*"
    if frozen:  # chosen by name
        if keep == "cached":
            pytest.skip("a transpose that was made of a frozen weight is a constant of the model")
        model.requires_grad_(False)
    problem = Problem(model, MSE, (x, y), params=params)
    with pytest.raises(ProblemError, match=r"parameter 'first.weight'.*closure"):
        problem.gradient() if what == "gradient" else registry.build(what).lower(problem) @ torch.ones(12).double()
    assert all(p.requires_grad is not frozen for p in model.parameters())


@pytest.mark.parametrize("term", ["hessian", "ggn", "covariance"])
def test_checkpoints_recompute_with_the_exchanged_parameters(term):
    class Checkpointed(nn.Module):
        def __init__(self, on):
            super().__init__()
            self.a, self.b, self.c, self.on = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), on

        def forward(self, x):
            f = lambda h: torch.tanh(self.b(h))
            h = torch.tanh(self.a(x))
            return self.c(checkpoint(f, h, use_reentrant=False) if self.on else f(h))

    on, off = Checkpointed(True).double(), Checkpointed(False).double()
    off.load_state_dict(on.state_dict())
    x, y = data()
    for params in (None, "a.*", "b.*"):
        got, expected = (registry.build(term).lower(Problem(m, MSE, (x, y), params=params)) for m in (on, off))
        eye = torch.eye(got.shape[0]).double()
        assert torch.allclose(got @ eye, expected @ eye, atol=1e-12)


# -- calls that differ --------------------------------------------------------------------------------------------------------

GENERATOR, NUMPY = torch.Generator(), np.random.default_rng(0)


class Own(nn.Module):
    """Draws from a generator of its own, in an attribute."""

    def __init__(self, generator):
        super().__init__()
        self.layer, self.generator = nn.Linear(3, 2).double(), generator

    def forward(self, x):
        if isinstance(self.generator, torch.Generator):
            noise = torch.rand(len(x), 1, generator=self.generator).double()
        else:
            noise = torch.from_numpy(np.asarray(self.generator.random(size=(len(x), 1))))
        return self.layer(x) * noise


RANDOM = {
    "global torch generator": lambda: Net(lambda h: h * torch.rand(h.shape, generator=GENERATOR)),
    "global NumPy generator": lambda: Net(lambda h: h * torch.from_numpy(NUMPY.random(h.shape))),
    "own torch generator": lambda: Own(torch.Generator()),
    "own NumPy generator": lambda: Own(np.random.default_rng(1)),
    "own RandomState": lambda: Own(np.random.RandomState(1)),
}


@pytest.mark.parametrize("term", ["hessian", "ggn", "covariance", "jacobian"])
@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_of_a_models_own_are_refused(name, term):
    x, y = data()
    problem = Problem(RANDOM[name](), MSE, (x, y), cache=0)
    with pytest.raises(ProblemError, match="random"):
        registry.build(term).lower(problem) @ torch.ones(problem.size).double()
    with pytest.raises(ProblemError, match="random"):
        problem.gradient()


def position(generator):
    """Where a generator of torch or NumPy stands, to be compared."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    return repr(getattr(generator, "bit_generator", generator).__getstate__())


@pytest.mark.parametrize("name", ["own torch generator", "own NumPy generator", "own RandomState"])
def test_own_generators_are_replayed_where_draws_are_frozen(name):
    model = RANDOM[name]()
    before = position(model.generator)
    x, y = data()
    op = registry.build("ggn").lower(Problem(model, MSE, (x, y), cache=0, randomness="frozen"))
    v = torch.ones(8).double()
    assert torch.equal(op @ v, op @ v)
    assert position(model.generator) == before


class Running(nn.Module):
    """A mean over calls, in a tensor that is no buffer; ``inside`` a list."""

    def __init__(self, inside):
        super().__init__()
        self.layer, self.inside = nn.Linear(3, 2).double(), inside
        self.mean = [torch.zeros(3).double()] if inside else torch.zeros(3).double()

    def forward(self, x):
        mean = self.mean[0] if self.inside else self.mean
        mean.mul_(0.9).add_(0.1 * x.mean(0))
        return torch.tanh(self.layer(x * (1 + mean)))


@pytest.mark.parametrize("term", ["hessian", "ggn", "covariance"])
@pytest.mark.parametrize("options", [{}, {"cache": 0}], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_a_state_that_calls_change_in_place_is_put_back(inside, options, term):
    model = Running(inside)
    x, y = data()

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model.layer

        def forward(self, x):
            return torch.tanh(self.layer(x * (1 + 0.1 * x.mean(0))))

    op, expected = (registry.build(term).lower(Problem(m, MSE, (x, y), **options)) for m in (model, Fixed()))
    v = torch.randn(8).double()
    for _ in range(2):
        assert torch.allclose(op @ v, expected @ v, atol=1e-12)
    assert not (model.mean[0] if inside else model.mean).any()


def test_a_state_in_plain_numbers_that_changes_the_output_is_refused():
    class Drifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.count = nn.Linear(3, 2).double(), [0]

        def forward(self, x):
            self.count[0] += 1
            return self.layer(x) * self.count[0]

    x, y = data()
    for term in ("ggn", "hessian", "covariance", "jacobian"):
        with pytest.raises(ProblemError, match="not the same in every call"):
            registry.build(term).lower(Problem(Drifts(), MSE, (x, y))) @ torch.ones(8).double()


# -- losses that depend on more than the output -------------------------------------------------------------------------------


def test_a_penalty_inside_the_loss_is_refused_by_name():
    model = nn.Linear(3, 2).double()
    x, y = data()
    penalty = lambda o, t: MSE(o, t) + 0.1 * sum(p.square().sum() for p in model.parameters())
    problem = Problem(model, penalty, (x, y), reduction="mean")
    for ask in (
        problem.value,
        problem.gradient,
        lambda: registry.build("hessian").lower(problem) @ torch.ones(8).double(),
    ):
        with pytest.raises(LossError, match=r"parameters.*penalty.*Identity"):
            ask()
