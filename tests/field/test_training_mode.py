"""Batch-norm, weight norms, dropout and other random layers, in training and in evaluation mode."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from curvalg import CurvalgError, Problem, ProblemError, registry
from tests.support.dense import Case, Dense
from tests.support.field.models import (
    CE,
    TERMS,
    N,
    X,
    Y,
    batches,
    ce,
    clone_state,
    lower,
    mlp,
    ones,
    product,
    reference,
    same_state,
)


def normed():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


PAIRS = [(X[:3], Y[:3]), (X[3:], Y[3:])]


def on_pairs(model, rows=ce, **options):
    return Dense(Case(model, None, PAIRS, rows, float(N), **options))


def test_batch_norm_in_training_mode_uses_batch_statistics(build_net, agrees):
    model = build_net(normed).train()
    agrees(Problem(model, CE, PAIRS), on_pairs(model))


def test_batch_norm_in_evaluation_mode_uses_running_statistics(build_net, agrees):
    model = build_net(normed)
    model(X)
    model.eval()
    agrees(Problem(model, CE, batches()), reference(model))


def test_batch_norm_in_training_mode_has_no_per_sample_gradients(build_net):
    model = build_net(normed).train()
    op = registry.build("covariance_diagonal").lower(Problem(model, CE, PAIRS))
    with pytest.raises(ProblemError, match=r"batch statistics.*model\.eval\(\)"):
        op @ ones(op)


def test_batch_norm_without_running_statistics_has_no_per_sample_gradients(build_net):
    model = build_net(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))).eval()
    op = registry.build("covariance_diagonal").lower(Problem(model, nn.MSELoss(), (X, torch.zeros(N, 4).double())))
    with pytest.raises(ProblemError, match="batch statistics"):
        op @ ones(op)


@pytest.mark.parametrize("name", [*TERMS, "jacobian", "covariance_diagonal"])
def test_running_statistics_are_intact(name, build_net):
    model = build_net(normed)
    model(X)
    model.train(name != "covariance_diagonal")
    before, tensors = clone_state(model), {n: id(t) for n, t in model.named_buffers()}
    problem = Problem(model, CE, PAIRS)
    op = registry.build(name).lower(problem)
    op @ ones(op), problem.value(), problem.gradient()
    assert same_state(model, before)
    assert {n: id(t) for n, t in model.named_buffers()} == tensors
    assert int(model[1].num_batches_tracked) == 1


def test_running_statistics_that_a_model_reassigns_are_intact(build_net, agrees):
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = mlp(), 0
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return self.inner(x - self.mean)

    model = build_net(Moving)
    model(X)
    before, calls = model.mean.clone(), model.calls
    agrees(Problem(model, CE, PAIRS), on_pairs(model))
    assert torch.equal(model.mean, before)
    assert model.calls == calls


def test_running_statistics_of_spectral_norm_are_intact(build_net, agrees):
    model = build_net(
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))
    )
    model(X)
    model.eval()
    before = clone_state(model)
    agrees(Problem(model, CE, batches()), reference(model))
    model.train()  # the power iteration moves its vectors in every call
    product("hessian", model, CE, batches())
    assert same_state(model, before)


class NaiveWeightNorm(nn.Module):
    """Weight normalisation written out, with the parameters in torch's order."""

    def __init__(self, layer) -> None:
        super().__init__()
        weight = layer.parametrizations.weight
        self.bias, self.g, self.v = (nn.Parameter(p.detach()) for p in (layer.bias, weight.original0, weight.original1))

    def forward(self, x):
        return x @ (self.v * (self.g / self.v.norm(dim=1, keepdim=True))).T + self.bias


def weight_normed():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))


def test_weight_norm_by_parametrisation(build_net, agrees):
    """The double backward of torch._weight_norm is wrong in torch 2.13: gradgradcheck fails, the Hessian is not symmetric."""
    model = build_net(weight_normed)
    expected = reference(nn.Sequential(NaiveWeightNorm(model[0]), *model[1:]))
    agrees(Problem(model, CE, batches()), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_by_hooks(build_net):
    old = build_net(lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)))
    got = lower("hessian", Problem(old, CE, batches())).to_dense()
    model = build_net(weight_normed)
    expected = reference(nn.Sequential(NaiveWeightNorm(model[0]), *model[1:]))
    for term in ("ggn", "hessian"):
        got = lower(term, Problem(old, CE, batches())).to_dense()
        assert torch.allclose(got.diag().sort().values, expected.matrix(term).diag().sort().values, atol=1e-12)
        assert torch.allclose(got, got.T, atol=1e-12)
    assert isinstance(old[0].weight, torch.Tensor)
    assert not isinstance(old[0].weight, nn.Parameter)


class Functional(nn.Module):
    """Dropout that eval() does not switch off."""

    def __init__(self, training=True) -> None:
        super().__init__()
        self.a, self.b, self.always = nn.Linear(3, 8), nn.Linear(8, 3), training

    def forward(self, x):
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.5, training=self.always))


class Noise(Functional):
    def forward(self, x):
        h = self.a(x)
        return self.b(h + torch.randn_like(h))


class Stochastic(Functional):
    """Stochastic depth by a draw from torch, Python or NumPy."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h * (2.0 if self.draw() < 0.5 else 1.0))


RANDOM = {
    "dropout": lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).train(),
    "functional dropout": lambda: Functional().eval(),
    "noise": lambda: Noise().eval(),
    "recurrent dropout": lambda: _Last(nn.GRU(1, 3, 2, dropout=0.5, batch_first=True)).train(),
    "attention dropout": lambda: _Mixed(0.5).eval(),
    "encoder layer": lambda: nn.Sequential(nn.TransformerEncoderLayer(3, 1, 4, dropout=0.5)).train(),
    "random activation": lambda: nn.Sequential(nn.Linear(3, 8), nn.RReLU(), nn.Linear(8, 3)).train(),
    "stochastic depth, torch": lambda: Stochastic(lambda: torch.rand(()).item()),
    "stochastic depth, Python": lambda: Stochastic(random.random),
    "stochastic depth, NumPy": lambda: Stochastic(np.random.rand),
}


class _Last(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x[:, :, None])[0][:, -1]


class _Mixed(nn.Module):
    """The well-known slip: dropout_p is passed in evaluation mode too."""

    def __init__(self, p):
        super().__init__()
        self.qkv, self.p = nn.Linear(1, 3), p

    def forward(self, x):
        q, k, v = self.qkv(x[:, :, None]).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p)[:, :, 0]


@pytest.mark.parametrize("name", ["hessian", "ggn", "centered_covariance", "jacobian"])
@pytest.mark.parametrize("kind", RANDOM)
def test_random_layers_in_training_mode_are_refused_with_the_cure(kind, name, build_net):
    model = build_net(RANDOM[kind])
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    with pytest.raises(ProblemError, match=r"model\.eval\(\).*randomness='frozen'"):
        product(name, model, CE, batches())
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize(
    "name", ["hessian", "ggn", "covariance", "centered_covariance", "jacobian", "covariance_diagonal"]
)
@pytest.mark.parametrize("kind", RANDOM)
def test_random_layers_frozen_replay_the_same_draws(kind, name, build_net, vectors):
    model = build_net(RANDOM[kind])
    problem = Problem(model, CE, batches(), randomness="frozen")
    op = registry.build(name).lower(problem)
    V = vectors(op.shape[1], 2)
    first = op @ V
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    for k in range(6):
        torch.manual_seed(k), random.seed(k), np.random.seed(k)
        assert torch.equal(op @ V, first)
    torch.manual_seed(0)
    again = registry.build(name).lower(Problem(model, CE, batches(), randomness="frozen"))
    assert torch.allclose(again @ V, first, atol=1e-12)
    if name != "jacobian":
        dense = op.to_dense()
        assert torch.allclose(dense, dense.T, atol=1e-12)
    assert first.any()
    random.setstate(before[0])


def test_random_layers_that_draw_nothing_in_evaluation_mode_are_not_refused(build_net, agrees):
    model = build_net(RANDOM["dropout"]).eval()
    agrees(Problem(model, CE, batches()), reference(model))
    idle = build_net(lambda: nn.Sequential(mlp(), nn.Dropout(0.0))).train()
    agrees(Problem(idle, CE, batches()), reference(idle))


class Masked(nn.Module):
    """The reference of dropout: a mask instead of a draw; x and the mask side by side."""

    def __init__(self, model) -> None:
        super().__init__()
        self.a, self.b = copy.deepcopy(model[0]), copy.deepcopy(model[3])

    def forward(self, inputs):
        x, mask = inputs
        return self.b(torch.tanh(self.a(x)) * mask)


def test_dropout_frozen_equals_the_model_with_its_masks_fixed(build_net, agrees):
    model, masks = build_net(RANDOM["dropout"]), []
    # Where tanh is not zero, output over input is the mask; 1/(1 - p) = 2.
    hook = model[2].register_forward_hook(lambda m, args, out: masks.append(2.0 * (out != 0).detach().double()))
    problem = Problem(model, CE, batches(), randomness="frozen", verify=False)
    lower("hessian", problem) @ torch.ones(problem.size).double()
    hook.remove()
    assert len(masks) == 3
    assert [len(m) for m in masks] == [2, 3, 1]
    data = [((x, mask), y) for (x, y), mask in zip(batches(), masks, strict=True)]
    expected = Dense(Case(Masked(model), None, data, ce, float(N)))
    agrees(problem, expected)
    diagonal = registry.build("covariance_diagonal").lower(problem) @ torch.ones(problem.size).double()
    assert torch.allclose(diagonal, expected.covariance.diag(), atol=1e-12)
    assert "same draws" in lower("ggn", problem).explain()
    expected_value = sum(ce(Masked(model)(x), y).sum().item() for x, y in data) / N
    assert abs(problem.value() - expected_value) < 1e-12


def test_a_loss_that_draws_random_numbers_is_refused(build_net):
    """Sampled losses: the guard is around the model only unless the loss is watched too."""

    def sampled(z, y):
        keep = torch.rand(len(z)) < 0.5
        return (ce(z, y) * keep).sum() + 0.01 * ce(z, y).sum()

    model = build_net(mlp)
    before = torch.get_rng_state()
    with pytest.raises(CurvalgError, match="random"):
        product("hessian", model, sampled, batches(), reduction="sum")
    assert torch.equal(torch.get_rng_state(), before)
