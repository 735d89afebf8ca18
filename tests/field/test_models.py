"""Troubles of users with models: one test, or more, for every line of the list they were gathered in."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from curvalg import CurvalgError, CurvalgWarning, Identity, LossError, Problem, ProblemError, registry
from curvalg.losses import CrossEntropy
from tests.support.dense import Case, Dense

_g = torch.Generator().manual_seed(1)


def rng():
    return torch.Generator().manual_seed(2)


N = 6
X = torch.randn(N, 3, generator=_g).double()
Y = torch.tensor([0, 2, 1, 1, 0, 2])
R = torch.randn(N, 3, generator=_g).double()
S = torch.randn(N, 3, 4, generator=_g).double()  # sequences of three steps of width 4
CE = nn.CrossEntropyLoss()
TERMS = ("hessian", "ggn", "covariance", "centered_covariance")


def ce(z, y, **options):
    return F.cross_entropy(z, y, reduction="none", **options)


def mse(z, y):
    return (z - y).square().reshape(len(y), -1).sum(1)


def batches(x=X, y=Y):
    return [(x[:2], y[:2]), (x[2:5], y[2:5]), (x[5:], y[5:])]


def reference(model, x=X, y=Y, **options):
    """Under plain cross-entropy."""
    return Dense(Case(model, None, batches(x, y), ce, float(len(y)), **options))


def lower(name, problem):
    return registry.build(name).lower(problem)


def ones(op):
    return torch.ones(op.shape[1]).double()


def product(name, *args, **options):
    op = lower(name, Problem(*args, **options))
    return op @ torch.ones(op.shape[1])


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def clone_state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same_state(model, before):
    return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# -- parameters unused by the loss -> zeros -----------------------------------------------------------------------------------


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.head = nn.Linear(3, 4), nn.Linear(2, 2), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


def test_parameters_unused_by_the_loss_have_zero_rows_and_columns(build_net, agrees):
    model = build_net(Unused)
    problem = Problem(model, CE, batches())
    agrees(problem, reference(model))
    inside = problem.layout.slices["unused.weight"]
    for name in TERMS:
        dense = lower(name, problem).to_dense()
        assert not dense[inside].any()
        assert not dense[:, inside].any()
    assert not (registry.build("covariance_diagonal").lower(problem) @ torch.ones(problem.size).double())[inside].any()
    assert torch.equal(problem.gradient()[inside], torch.zeros(4).double())


def test_parameters_unused_in_some_batches_only(build_net, agrees):
    """A branch that depends on the data: mixtures of experts, early exits."""

    class Branch(Unused):
        def forward(self, x):
            return super().forward(x) + (self.unused(x[:, :2]).sum(1, keepdim=True) if x.shape[0] > 2 else 0)

    model = build_net(Branch)
    agrees(Problem(model, CE, batches()), reference(model))


def test_parameters_unused_altogether_are_told(build_net):
    model = build_net(Unused)
    for name in TERMS:
        with pytest.warns(CurvalgWarning, match="does not depend"):
            assert not product(name, model, CE, batches(), params=["unused.*"]).any()


def test_parameters_that_enter_linearly_have_zero_residual(build_net, agrees):
    model = build_net(nn.Linear, 3, 3)
    problem = Problem(model, CE, batches())
    agrees(problem, reference(model))
    assert not lower("residual", problem).to_dense().any()


# -- frozen layers -> honour the selection ------------------------------------------------------------------------------------


def test_frozen_layers_are_left_out(build_net, agrees):
    model = build_net(mlp)
    model[0].requires_grad_(False)
    problem = Problem(model, CE, batches())
    assert problem.layout.names == ["2.weight", "2.bias"]
    agrees(problem, reference(model))


@pytest.mark.parametrize("params", ["2.*", ["2.weight", "2.bias"], ["*.bias"], "0.weight"])
def test_frozen_layers_or_not_the_selection_by_name_counts(params, build_net, agrees):
    model = build_net(mlp)
    model.requires_grad_(False)
    names = Problem(model, CE, batches(), params=params).layout.names
    agrees(Problem(model, CE, batches(), params=params), reference(model, names=names))
    assert not any(p.requires_grad for p in model.parameters())


def test_frozen_layers_are_not_computed_with_derivatives(build_net):
    """Nothing of a graph reaches a frozen body."""
    model, seen = build_net(mlp), []
    model[0].requires_grad_(False)
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    product("hessian", model, CE, batches())
    assert seen
    assert not any(seen)


def test_frozen_altogether_is_explained(build_net):
    model = build_net(mlp).requires_grad_(False)
    with pytest.raises(ProblemError, match=r"requires_grad=True.*params="):
        Problem(model, CE, batches())


# -- tied weights -> once ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.bias = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.outer.weight = self.inner.weight

    def forward(self, x):
        return self.bias(self.outer(torch.tanh(self.inner(x))))


def test_tied_weights_are_counted_once(build_net, agrees):
    model = build_net(Tied)
    problem = Problem(model, CE, batches())
    assert problem.size == 9 + 9 + 3
    agrees(problem, reference(model))
    assert model.outer.weight is model.inner.weight
    diagonal = registry.build("covariance_diagonal").lower(problem) @ torch.ones(problem.size).double()
    assert torch.allclose(diagonal, reference(model).covariance.diag(), atol=1e-12)


def test_tied_weights_chosen_by_their_second_name(build_net, agrees):
    model = build_net(Tied)
    agrees(Problem(model, CE, batches(), params=["outer.weight"]), reference(model, names=["inner.weight"]))


def test_tied_modules_are_counted_once(build_net, agrees):
    def shared():
        layer = nn.Linear(3, 3)
        return nn.Sequential(layer, nn.Tanh(), layer)

    model = build_net(shared)
    problem = Problem(model, CE, batches())
    assert problem.size == 12
    agrees(problem, reference(model))


# -- a callable that ignores the parameters it is given -> warn -----------------------------------------------------------------


@pytest.mark.parametrize("name", [*TERMS, "jacobian"])
def test_callable_that_ignores_its_parameters_is_told(name, build_net):
    model = build_net(mlp)
    params = dict(model.named_parameters())
    with pytest.warns(CurvalgWarning, match="must use the parameters it is passed"):
        result = product(name, lambda p, x: model(x), CE, batches(), params=params)
    assert not result.any()


def test_callable_that_uses_its_parameters(build_net, agrees):
    model = build_net(mlp)
    params = dict(model.named_parameters())
    problem = Problem(lambda p, x: torch.func.functional_call(model, p, (x,)), CE, batches(), params=params)
    agrees(problem, reference(model))


def test_callable_on_plain_tensors_and_mappings(build_net, agrees):
    model = build_net(mlp)
    w = {n.replace(".", "_"): p.detach().clone() for n, p in model.named_parameters()}

    def run(p, batch):
        h = torch.tanh(batch["x"] @ p["0_weight"].T + p["0_bias"])
        return h @ p["2_weight"].T + p["2_bias"]

    data = [{"x": x, "labels": y} for x, y in batches()]
    agrees(Problem(run, CE, data, params=w), reference(model))


def test_callable_without_parameters_is_explained():
    with pytest.raises(ProblemError, match=r"params=\{name: tensor\}"):
        Problem(lambda p, x: x, CE, batches())


@pytest.mark.parametrize("how", ["detach", "no_grad", "numpy"])
def test_module_that_cuts_its_own_graph_is_told(how, build_net):
    class Cut(nn.Linear):
        def forward(self, x):
            if how == "no_grad":
                with torch.no_grad():
                    return super().forward(x)
            z = super().forward(x).detach()
            return torch.from_numpy(z.numpy()) if how == "numpy" else z

    model = build_net(Cut, 3, 3)
    for name in ("hessian", "ggn"):
        with pytest.warns(CurvalgWarning, match="does not depend"):
            product(name, model, CE, batches())


# -- batch-norm and dropout in training mode ------------------------------------------------------------------------------------


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


# -- in-place activations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.Hardtanh, nn.LeakyReLU, nn.SiLU])
def test_inplace_relu_and_its_kin(activation, build_net, agrees):
    model = build_net(lambda: nn.Sequential(nn.Linear(3, 4), activation(inplace=True), nn.Linear(4, 3)))
    agrees(Problem(model, CE, batches()), reference(model))


def test_inplace_relu_on_the_output_and_on_a_residual_branch(build_net, agrees):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = self.a(x)
            h += x
            return F.softplus(self.b(F.relu(h, inplace=True))).add_(1).mul_(2)

    model = build_net(Block)
    agrees(Problem(model, CE, batches()), reference(model))


def test_inplace_relu_on_the_inputs_leaves_the_data_alone(build_net):
    model, x = build_net(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))), X.clone()
    try:
        product("hessian", model, CE, (x, Y), cache=0)
    except ProblemError as error:
        assert "place" in str(error)
    else:
        assert torch.equal(x, X)


# -- fused attention --------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, causal=False, mask=False, backend=None) -> None:
        super().__init__()
        self.qkv, self.head, self.causal, self.mask, self.backend = (
            nn.Linear(4, 12),
            nn.Linear(4, 3),
            causal,
            mask,
            backend,
        )

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = torch.tensor([[True, False, True]] * 3) if self.mask else None
        with sdpa_kernel(self.backend) if self.backend else nullcontext():
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": True}], ids=["full", "causal", "masked"])
def test_fused_attention_of_torch(options, build_net, agrees):
    model = build_net(Attention, **options)
    agrees(Problem(model, CE, batches(S)), reference(model, S))
    J = lower("jacobian", Problem(model, CE, batches(S)))
    assert torch.allclose(J @ ones(J), reference(model, S).jacobian.sum(1), atol=1e-12)


def test_fused_attention_chosen_by_the_model_itself_is_explained(build_net):
    """A kernel switch inside forward overrides ours: fused attention has no second derivative, and first-order matrices need none."""
    model = build_net(Attention, backend=SDPBackend.FLASH_ATTENTION)
    with pytest.raises(ProblemError, match="second derivative"):
        product("hessian", model, CE, batches(S))
    plain = build_net(Attention, backend=SDPBackend.MATH)
    plain.load_state_dict(model.state_dict())
    expected = product("ggn", plain, CE, batches(S))
    assert torch.allclose(product("ggn", model, CE, batches(S)), expected, rtol=1e-10)


class MultiHead(nn.Module):
    def __init__(self, weights) -> None:
        super().__init__()
        self.attention, self.head, self.weights = (
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 3),
            weights,
        )

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=self.weights)[0].mean(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_fused_attention_of_multihead_attention(weights, training, build_net, agrees):
    model = build_net(MultiHead, weights).train(training)
    agrees(Problem(model, CE, batches(S)), reference(model, S))


@pytest.mark.parametrize("frozen", [False, True])
def test_fused_attention_of_an_encoder_layer_in_evaluation_mode(frozen, build_net, agrees):
    """Without gradients torch takes a fast path there that nothing can differentiate."""
    model = build_net(
        lambda: nn.Sequential(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 1, enable_nested_tensor=False),
            nn.Flatten(),
            nn.Linear(12, 3),
        )
    ).eval()
    if frozen:
        model[0].requires_grad_(False)
    agrees(Problem(model, CE, batches(S)), reference(model, S), terms=("hessian", "ggn", "covariance"))


# -- recurrent layers: cuDNN's have no double backward ----------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind, **options) -> None:
        super().__init__()
        self.rnn = kind(4, 2, batch_first=True, **options)
        self.head = nn.Linear(4 if options.get("bidirectional") else 2, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}, {"proj_size": 1}], ids=str)
def test_recurrent_double_backward(options, build_net, agrees):
    model = build_net(Recurrent, nn.LSTM, **options) if "proj_size" not in options else build_net(Projected)
    flat = [id(w) for w in model.rnn._flat_weights]
    agrees(Problem(model, CE, batches(S)), reference(model, S))
    assert [id(w) for w in model.rnn._flat_weights] == flat


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 2, proj_size=1, batch_first=True), nn.Linear(1, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


# -- compiled modules -> the original ---------------------------------------------------------------------------------------------


def _whole(model, backend):
    return torch.compile(model, backend=backend)


def _part(model, backend):
    model[0] = torch.compile(model[0], backend=backend)
    return model


def _in_place(model, backend):
    model.compile(backend=backend)
    return model


def _twice(model, backend):
    return torch.compile(nn.Sequential(torch.compile(model, backend=backend)), backend=backend)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", [_whole, _part, _in_place, _twice])
def test_compiled_modules_use_the_original(how, backend, build_net, agrees):
    expected = reference(build_net(mlp))
    compiled = how(build_net(mlp), backend)
    compiled(X)  # compiled before it is used
    agrees(Problem(compiled, CE, batches()), expected, terms=("hessian", "ggn", "covariance"))
    assert torch.allclose(compiled(X), build_net(mlp)(X))


def test_compiled_modules_keep_the_names_of_parameters(build_net):
    problem = Problem(torch.compile(build_net(mlp), backend="eager"), CE, batches())
    assert problem.layout.names == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_compiled_functions_as_model_and_loss(build_net, agrees):
    model = build_net(mlp)
    params = dict(model.named_parameters())
    function = torch.compile(lambda p, x: torch.func.functional_call(model, p, (x,)), backend="aot_eager")
    agrees(Problem(function, CE, batches(), params=params), reference(model), terms=("hessian", "ggn"))
    loss = torch.compile(lambda z, y: F.cross_entropy(z, y), backend="aot_eager")
    agrees(Problem(model, loss, batches()), reference(model), terms=("hessian", "ggn"))
    agrees(Problem(model, torch.compile(CE, backend="aot_eager"), batches()), reference(model), terms=("hessian",))


def test_compiled_forward_method(build_net, agrees):
    model = build_net(mlp)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    agrees(Problem(model, CE, batches()), reference(build_net(mlp)), terms=("hessian", "ggn"))


# -- activation checkpointing -------------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant, where="middle", plain=False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.plain = plain
        self.reentrant, self.where = reentrant, where

    def body(self, x):
        return torch.tanh(self.second(x))

    def forward(self, x):
        if self.where == "middle":
            x = self.first(x)
        return self.head(self.body(x) if self.plain else checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("where", ["middle", "first"])
def test_activation_checkpointing_without_reentry(where, build_net, agrees):
    problem = Problem(build_net(Checkpointed, False, where), CE, batches())
    expected = reference(build_net(Checkpointed, False, where, plain=True))
    agrees(problem, expected)
    J = lower("jacobian", problem)
    assert torch.allclose(J @ ones(J), expected.jacobian.sum(1), atol=1e-12)
    diagonal = registry.build("covariance_diagonal").lower(problem) @ torch.ones(problem.size).double()
    assert torch.allclose(diagonal, expected.covariance.diag(), atol=1e-12)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "name", ["hessian", "ggn", "covariance", "centered_covariance", "jacobian", "covariance_diagonal"]
)
@pytest.mark.parametrize("where", ["middle", "first"])
def test_activation_checkpointing_with_reentry_is_explained(where, name, build_net):
    """Where the first layer is checkpointed, no input requires a gradient, and reentry drops the parameters silently."""
    model = build_net(Checkpointed, True, where)
    with pytest.raises(ProblemError, match="use_reentrant=False"):
        product(name, model, CE, batches())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_activation_checkpointing_with_reentry_has_no_wrong_gradient(build_net):
    with pytest.raises(ProblemError, match="use_reentrant=False"):
        Problem(build_net(Checkpointed, True, "first"), CE, batches()).gradient()


# -- wrappers -> unwrap -------------------------------------------------------------------------------------------------------------


def test_data_parallel_wrappers_are_unwrapped(build_net, agrees):
    model = build_net(mlp)
    problem = Problem(nn.DataParallel(model), CE, batches())
    assert problem.layout.names[0] == "0.weight"
    agrees(problem, reference(model))
    agrees(Problem(torch.compile(nn.DataParallel(model), backend="eager"), CE, batches()), reference(model))


def test_data_parallel_inside_a_model(build_net, agrees):
    model = build_net(mlp)
    problem = Problem(nn.Sequential(OrderedDict(inner=nn.DataParallel(model))), CE, batches())
    agrees(problem, reference(model))


@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel_wrappers_are_unwrapped(build_net, agrees, tmp_path):
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    if distributed.is_initialized():
        pytest.skip("a process group is open already")
    try:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    except RuntimeError as error:
        pytest.skip(f"no process group: {error}")
    try:
        model = build_net(mlp)
        wrapped = nn.parallel.DistributedDataParallel(model)
        problem = Problem(wrapped, CE, batches())
        assert problem.layout.names[0] == "0.weight"
        agrees(problem, reference(build_net(mlp)))
        CE(wrapped(X), Y).backward()  # its hooks still work
        assert all(p.grad is not None for p in model.parameters())
    finally:
        distributed.destroy_process_group()


# -- forward AD missing for an operation -> double backward, told by explain() ---------------------------------------------------------


class Square(torch.autograd.Function):
    """No jvp; its backward can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Squared(nn.Module):
    def __init__(self, plain=False) -> None:
        super().__init__()
        self.a, self.b, self.plain = nn.Linear(3, 4), nn.Linear(4, 3), plain

    def forward(self, x):
        h = self.a(x)
        return self.b(h * h if self.plain else Square.apply(h))


def test_forward_ad_missing_falls_back_to_double_backward(build_net, agrees):
    model = build_net(Squared)
    expected = reference(build_net(Squared, plain=True))
    problem = Problem(model, CE, batches())
    agrees(problem, expected)
    op = lower("ggn", Problem(model, CE, batches()))  # forward AD is tried for single columns
    op @ ones(op)
    assert "no forward AD" in op.explain()
    J = lower("jacobian", problem)
    assert torch.allclose(J @ ones(J), expected.jacobian.sum(1), atol=1e-12)


@pytest.mark.parametrize("name", ["hessian", "residual"])
def test_second_derivative_missing_of_an_operation_of_torch_is_explained(name, build_net):
    model = build_net(Post, lambda z: torch.cdist(z[:, :, None], z.tanh()[:, :, None]).mean(2))
    with pytest.raises(ProblemError, match=r"lacks a second derivative.*_cdist_backward"):
        product(name, model, CE, batches())


class OnceDifferentiable(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class OnceSquared(Squared):
    def forward(self, x):
        return self.b(OnceDifferentiable.apply(self.a(x)))


@pytest.mark.parametrize("name", [*TERMS, "residual", "jacobian"])
def test_second_derivative_missing_is_explained_or_not_needed(name, build_net):
    """autograd.grad(..., inputs) never runs the node that raises for once_differentiable: the part would be dropped."""
    expected = reference(build_net(Squared, plain=True)).matrix(name).sum(1)
    try:
        got = product(name, build_net(OnceSquared), CE, batches())
    except CurvalgError as error:
        assert "second derivative" in str(error) or "twice" in str(error)
    else:
        assert torch.allclose(got, expected, atol=1e-12)


# -- non-contiguous parameters ----------------------------------------------------------------------------------------------------------


def test_non_contiguous_parameters(build_net, agrees):
    model = build_net(mlp)
    expected = reference(model)
    model[0].weight = nn.Parameter(model[0].weight.detach().T.contiguous().T)
    model[2].weight = nn.Parameter(torch.stack([model[2].weight.detach()] * 2, -1)[..., 0])
    assert not model[0].weight.is_contiguous()
    assert not model[2].weight.is_contiguous()
    problem = Problem(model, CE, batches())
    agrees(problem, expected)
    diagonal = registry.build("covariance_diagonal").lower(problem) @ torch.ones(problem.size).double()
    assert torch.allclose(diagonal, expected.covariance.diag(), atol=1e-12)


def test_non_contiguous_parameters_of_convolutions_in_channels_last(build_net, agrees):
    images = torch.randn(N, 2, 3, 3, generator=rng()).double()
    make = lambda: nn.Sequential(nn.Conv2d(2, 2, 2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3))
    model = build_net(make).to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    agrees(Problem(model, CE, batches(images)), reference(build_net(make), images))


def test_non_contiguous_operands_and_data(build_net, vectors):
    model = build_net(mlp)
    op = lower("hessian", Problem(model, CE, (X.T.contiguous().T, Y)))
    V = vectors(op.shape[1], 2).T.contiguous().T
    assert torch.allclose(op @ V, reference(model).hessian @ V, atol=1e-12)


# -- parameters of several dtypes, half precision, autocast -----------------------------------------------------------------------------


class TwoTypes(nn.Module):
    def __init__(self, double=False) -> None:
        super().__init__()
        self.body, self.head, self.double_body = nn.Linear(3, 4), nn.Linear(4, 3), double

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.to(self.body.weight.dtype))).double())


def test_parameters_of_several_dtypes(build_net, agrees):
    model = build_net(TwoTypes)
    model.body.float()
    expected = reference(copy.deepcopy(model).double())
    problem = Problem(model, CE, batches())
    op = lower("hessian", problem)
    assert op.dtype == np.float64
    assert problem.dtype == torch.float64
    agrees(problem, expected, tolerance=1e-5)
    tree = op @ problem.layout.unflatten(torch.ones(problem.size))
    assert torch.allclose(problem.layout.flatten(tree), op @ ones(op))
    diagonal = registry.build("covariance_diagonal").lower(problem) @ torch.ones(problem.size).double()
    assert torch.allclose(diagonal, expected.covariance.diag(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [*TERMS, "jacobian"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_finite_float32_products(dtype, name, build_net, vectors):
    half = build_net(mlp).to(dtype)
    data = [(x.to(dtype), y) for x, y in batches()]
    op = lower(name, Problem(half, CE, data))
    assert op.dtype == np.float32
    exact = Dense(Case(copy.deepcopy(half).double(), None, [(x.double(), y) for x, y in data], ce, float(N)))
    V = vectors(op.shape[1], 2).float()
    got, expected = op @ V, exact.matrix(name) @ V.double()
    assert got.dtype == torch.float32
    assert torch.isfinite(got).all()
    error = (got.double() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype], float(error)
    assert (op @ np.ones(op.shape[1], np.float32)).dtype == np.float32


def test_half_precision_sums_over_many_batches_in_float32(build_net):
    """In half precision the sum would stop growing: 1e-3 added to 4 is 4."""
    model = build_net(nn.Linear, 1, 1, dtype=torch.float16)
    data = [(torch.ones(1, 1).half(), torch.zeros(1, 1))] * 5000
    op = lower("ggn", Problem(model, nn.MSELoss(reduction="sum"), data))
    assert abs(float((op @ np.array([1.0, 0.0], np.float32))[0]) - 10000) < 1


@pytest.mark.parametrize("name", [*TERMS, "covariance_diagonal", "jacobian"])
def test_half_precision_that_overflows_is_refused_not_nan(name, build_net):
    model = build_net(mlp).half()
    with torch.no_grad():
        model[2].weight.mul_(1e5)
    data = [(x.half(), y) for x, y in batches()]
    with pytest.raises(ProblemError, match="NaN or infinite"):
        product(name, model, CE, data)


@pytest.mark.parametrize("name", [*TERMS, "covariance_diagonal"])
def test_autocast_around_the_product_changes_nothing(name, build_net, vectors):
    problem = Problem(build_net(mlp), CE, batches())
    expected = (
        reference(build_net(mlp)).matrix(name) if name in TERMS else reference(build_net(mlp)).covariance.diag().diag()
    )
    V = vectors(problem.size, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = registry.build(name).lower(problem) @ V
        assert torch.is_autocast_enabled("cpu")
    assert (got - expected @ V).norm() < 1e-10 * (expected @ V).norm()
    with torch.autocast("cpu", torch.bfloat16):
        fresh = Problem(build_net(mlp), CE, batches())
        assert abs(fresh.value() - CE(build_net(mlp)(X).double(), Y).item()) < 1e-2
        assert torch.equal(fresh.gradient(), problem.gradient())


class Cast(nn.Module):
    def __init__(self, dtype) -> None:
        super().__init__()
        self.inner, self.dtype = mlp(), dtype

    def forward(self, x):
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            return self.inner(x)


@pytest.mark.parametrize("name", [*TERMS, "jacobian"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_forward_gives_finite_float32_products(dtype, name, build_net, vectors):
    model = build_net(Cast, dtype, dtype=torch.float32)
    data = [(x.float(), y) for x, y in batches()]
    op = lower(name, Problem(model, CE, data))
    V = vectors(op.shape[1], 2).float()
    first = op @ V
    expected = reference(build_net(Cast, None)).matrix(name) @ V.double()
    assert op.dtype == np.float32
    assert torch.isfinite(first).all()
    error = (first.double() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype], float(error)
    for _ in range(2):
        assert torch.equal(op @ V, first)


def test_float32_models_are_not_declared_float64(build_net):
    model = build_net(mlp, dtype=torch.float32)
    data = [(x.float(), y) for x, y in batches()]
    op = lower("hessian", Problem(model, CE, data))
    assert op.dtype == np.float32
    assert (op @ np.ones(op.shape[1], np.float32)).dtype == np.float32


def test_model_of_another_dtype_than_its_data_is_explained(build_net):
    with pytest.raises((CurvalgError, RuntimeError), match="dtype"):
        product("hessian", build_net(mlp, dtype=torch.float32), CE, batches())


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_parameters_are_refused():
    model = nn.Linear(3, 3).to(torch.complex128)
    with pytest.raises(ProblemError, match=r"'weight' is complex.*view_as_real"):
        Problem(model, nn.MSELoss(), batches())
    with pytest.raises(ProblemError, match="complex"):
        Problem(lambda p, x: x @ p["w"], nn.MSELoss(), batches(), params={"w": torch.randn(3, 3).cfloat()})


def test_complex_parameters_by_real_and_imaginary_parts(build_net, agrees):
    """The cure of the message."""

    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3, 2))

        def forward(self, x):
            return (x.to(torch.complex128) @ torch.view_as_complex(self.w)).abs()

    model = build_net(Complex)
    agrees(Problem(model, CE, batches()), reference(model), terms=("hessian", "ggn", "covariance"))


def test_complex_outputs_are_refused(build_net):
    class Phase(nn.Linear):
        def forward(self, x):
            return torch.complex(super().forward(x), x)

    with pytest.raises(ProblemError, match=r"floating-point tensor.*forward="):
        product("hessian", build_net(Phase, 3, 3), nn.MSELoss(), batches(X, R))


def test_complex_parameters_that_are_not_chosen_are_allowed(build_net, agrees):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.phase = mlp(), nn.Parameter(torch.ones(3, dtype=torch.complex128), requires_grad=False)

        def forward(self, x):
            return self.inner((x * self.phase).real)

    model = Both()
    model.inner.double()
    agrees(Problem(model, CE, batches()), reference(model), terms=("hessian", "covariance"))


# -- outputs of every shape -----------------------------------------------------------------------------------------------------------------

LOSSES = [nn.MSELoss(), nn.HuberLoss(), nn.SmoothL1Loss(), nn.BCEWithLogitsLoss(), nn.PoissonNLLLoss()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_squeezed_regression_outputs_are_refused_not_broadcast(loss, build_net):
    column = nn.Linear(3, 1)
    flat = build_net(lambda: nn.Sequential(column, nn.Flatten(0)))
    y = torch.rand(N).double()
    with pytest.raises(LossError, match=rf"output \({N},\) and target \({N}, 1\).*reshape"):
        product("hessian", flat, loss, (X, y[:, None]))
    with pytest.raises(LossError, match=rf"output \({N}, 1\) and target \({N},\).*target.reshape\(\({N}, 1\)\)"):
        product("hessian", column.double(), loss, (X, y))


def test_squeezed_regression_outputs_under_a_callable_loss_are_refused(build_net):
    model = build_net(nn.Linear, 3, 1)
    with pytest.raises(LossError, match=r"coupled|repeated"):
        product("hessian", model, lambda z, y: (z - y).square().mean(), (X, R[:, 0]))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", ["hessian", "ggn", "covariance"])
def test_squeezed_regression_outputs_under_a_callable_of_declared_reduction_are_refused(name, build_net):
    """reduction= says nothing about the shape (N, N) to which (N, 1) and (N,) broadcast."""
    model = build_net(nn.Linear, 3, 1)
    with pytest.raises(LossError, match=r"shape|coupled|broadcast"):
        product(name, model, lambda z, y: F.mse_loss(z, y), (X, R[:, 0]), reduction="mean")


def test_squeezed_regression_outputs_that_agree(build_net, agrees):
    model = build_net(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1), nn.Flatten(0)))
    y = R[:, 0]
    agrees(Problem(model, nn.MSELoss(), batches(X, y)), Dense(Case(model, None, batches(X, y), mse, float(N))))


class Segmenter(nn.Module):
    """Classes of every pixel, (N, C, d1, d2)."""

    def __init__(self, volume=False) -> None:
        super().__init__()
        conv = nn.Conv3d if volume else nn.Conv2d
        self.a, self.b = conv(1, 2, 2, padding=1), conv(2, 3, 2)

    def forward(self, x):
        return self.b(F.softplus(self.a(x)))


@pytest.mark.parametrize("volume", [False, True])
@pytest.mark.parametrize("samples", ["item", "position"])
def test_outputs_with_classes_and_space(samples, volume, build_net, agrees):
    shape = (2, 2, 2) if volume else (2, 3)
    images, labels = (
        torch.randn(3, 1, *shape, generator=rng()).double(),
        torch.randint(0, 3, (3, *shape), generator=rng()),
    )
    model = build_net(Segmenter, volume)
    rows = (lambda z, y: ce(z, y).flatten(1).sum(1)) if samples == "item" else (lambda z, y: ce(z, y).reshape(-1))
    data = [(images[:1], labels[:1]), (images[1:], labels[1:])]
    expected = Dense(Case(model, None, data, rows, float(labels.numel())))
    agrees(Problem(model, CE, data, samples=samples), expected, terms=("hessian", "ggn", "covariance"))


def test_outputs_with_classes_last_are_told_their_axis(build_net):
    model = build_net(nn.Linear, 4, 3)
    labels = torch.zeros(N, 3).long()
    with pytest.raises(LossError, match="class_axis=-1"):
        product("ggn", model, CE, (torch.randn(N, 5, 4).double(), torch.zeros(N, 5).long()))
    product("ggn", model, CrossEntropy(class_axis=-1), (S, labels))


BAD_OUTPUTS = {
    "scalar": (lambda z: z.sum(), ProblemError, "scalar.*leading axis"),
    "integers": (lambda z: z.argmax(1), ProblemError, "floating-point tensor.*int64"),
    "booleans": (lambda z: z > 0, ProblemError, "floating-point tensor.*bool"),
    "a number": (lambda z: 1.0, ProblemError, "floating-point tensor.*float"),
    "nothing": (lambda z: None, ProblemError, "floating-point tensor.*NoneType"),
    "an array": (lambda z: z.detach().numpy(), ProblemError, "floating-point tensor.*ndarray"),
    "a dict": (lambda z: {"logits": z}, LossError, "dict.*forward="),
    "a tuple": (lambda z: (z, z), LossError, "tuple.*forward="),
    "a tuple of unequal lengths": (lambda z: (z, z[:1]), ProblemError, "leading axis.*forward="),
    "logits and loss": (lambda z: {"loss": z.sum(), "logits": z}, ProblemError, "leading axis.*forward="),
    "labels": (lambda z: z[:, 0], LossError, r"CrossEntropy.*\(6,\)"),
    "another batch size": (lambda z: z[:3], LossError, r"\(3,\).*\(3, 3\).*\(2,\)|shape"),
}


class Post(nn.Module):
    def __init__(self, post) -> None:
        super().__init__()
        self.inner, self.post = mlp(), post

    def forward(self, x):
        return self.post(self.inner(x))


@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("kind", BAD_OUTPUTS)
def test_outputs_that_are_not_of_shape_n_c_are_explained(kind, name, build_net):
    post, error, message = BAD_OUTPUTS[kind]
    with pytest.raises(error, match=message):
        product(name, build_net(Post, post), CE, (X, Y))


class ModelOutput(OrderedDict):
    """As models of another library return: an ordered dict with attributes and a loss that is None."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def test_outputs_that_are_mappings_picked_by_forward(build_net, agrees):
    model = build_net(Post, lambda z: ModelOutput(loss=None, logits=z))
    with pytest.raises(LossError, match="forward="):
        product("ggn", model, CE, (X, Y))
    problem = Problem(model, CE, batches(), forward=lambda m, b: m(b[0]).logits)
    agrees(problem, reference(build_net(Post, lambda z: z)))
    data = [{"x": x, "labels": y} for x, y in batches()]
    agrees(Problem(model, CE, data, forward=lambda m, b: m(b["x"]).logits), reference(build_net(Post, lambda z: z)))


def test_outputs_that_are_mappings_under_a_callable_loss(build_net, agrees):
    model = build_net(Post, lambda z: ModelOutput(loss=None, logits=z, extra=z.exp()))
    problem = Problem(model, lambda out, y: F.cross_entropy(out["logits"], y) + 0 * out["extra"].sum(), batches())
    agrees(problem, reference(build_net(Post, lambda z: z)), terms=("hessian", "covariance"))


def test_outputs_with_attributes_under_a_callable_loss(build_net, agrees):
    """A loss written for a training loop reads output.logits: the structure arrives as the model made it."""
    model = build_net(Post, lambda z: ModelOutput(loss=None, logits=z))
    problem = Problem(model, lambda out, y: F.cross_entropy(out.logits, y), batches())
    agrees(problem, reference(build_net(Post, lambda z: z)), terms=("hessian", "covariance"))


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_outputs_that_are_not_finite_are_refused(build_net):
    for post in (lambda z: z / 0, lambda z: z * torch.nan):
        for name in TERMS:
            with pytest.raises(ProblemError, match="NaN or infinite"):
                product(name, build_net(Post, post), CE, (X, Y))


# -- losses that do not fit ---------------------------------------------------------------------------------------------------------------


BAD_LOSSES = {
    "not a scalar": (lambda z, y: ce(z, y), "scalar.*sum or average"),
    "a number": (lambda z, y: ce(z, y).mean().item(), "scalar tensor.*float"),
    "detached": (lambda z, y: ce(z, y).detach().mean(), "does not depend on the output"),
    "constant": (lambda z, y: y.double().square().mean(), "does not depend on the output"),
    "nothing": (lambda z, y: None, "scalar.*NoneType"),
}


@pytest.mark.parametrize("reduction", [None, "mean"])
@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_loss_that_is_not_a_scalar_of_the_output_is_explained(kind, name, reduction, build_net):
    loss, message = BAD_LOSSES[kind]
    with pytest.raises(LossError, match=message):
        product(name, build_net(mlp), loss, batches(), reduction=reduction)


# -- other modules -------------------------------------------------------------------------------------------------------------------------


def test_buffers_of_convolutions_and_their_norms(build_net, agrees):
    images = torch.randn(N, 1, 4, 4, generator=rng()).double()
    model = build_net(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2),
            nn.BatchNorm2d(2),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2, 3),
        )
    )
    model(images)
    before = clone_state(model.eval())
    problem = Problem(model, CE, batches(images))
    agrees(problem, reference(model, images))
    diagonal = registry.build("covariance_diagonal").lower(problem) @ torch.ones(problem.size).double()
    assert torch.allclose(diagonal, reference(model, images).covariance.diag(), atol=1e-12)
    assert same_state(model, before)


def test_buffers_that_are_not_persistent_or_none(build_net, agrees):
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("shift", torch.ones(3), persistent=False)
            self.register_buffer("nothing", None)

        def forward(self, x):
            return self.inner(x + self.shift)

    model = build_net(Buffers)
    agrees(Problem(model, CE, batches()), reference(model))


def test_lazy_modules_are_told_to_run_once(build_net, agrees):
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3)).double()
    with pytest.raises(ProblemError, match=r"'0\.weight' is not initialised.*run the model once"):
        Problem(model, CE, batches())
    model(X)
    agrees(Problem(model, CE, batches()), reference(model))


def test_lazy_modules_beside_the_chosen_parameters_are_told_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LazyLinear(3)).double()
    with pytest.raises(ProblemError, match="not initialised"):
        product("ggn", model, CE, batches(), params=["0.*"])


@pytest.mark.parametrize(
    "data",
    [((X, X), Y), {"x": X, "labels": Y}, (X, Y)],
    ids=["two inputs as one tuple", "a keyword of another name", "too few inputs"],
)
def test_wrong_call_convention_mentions_forward(data, build_net):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, left, right):
            return self.inner(left + right)

    with pytest.raises(ProblemError, match=r"forward=lambda model, batch"):
        product("ggn", build_net(Two), CE, data)


def test_type_error_inside_forward_keeps_its_cause(build_net):
    model = build_net(Post, lambda z: z + "a")
    with pytest.raises(ProblemError, match="failed on batch 0: TypeError") as caught:
        product("ggn", model, CE, (X, Y))
    assert isinstance(caught.value.__cause__, TypeError)


def test_module_class_or_anything_else_given_for_a_model_is_explained():
    with pytest.raises(ProblemError, match=r"nn.Module|parameters"):
        Problem(nn.Linear, CE, batches())
    with pytest.raises(ProblemError, match=r"nn.Module or a function"):
        Problem("model.pt", CE, batches())


def test_scripted_modules_are_right_or_explained(build_net):
    model = build_net(mlp)
    try:
        script = torch.jit.trace(model, X[:1])
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        got = product("hessian", script, CE, batches())
    except ProblemError as error:
        assert "script" in str(error).lower()
    else:
        assert torch.allclose(got, reference(model).hessian.sum(1), atol=1e-12)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_hooks_of_the_users_stay_and_do_not_disturb(build_net, agrees):
    model, seen = build_net(mlp), []
    model[0].register_forward_hook(lambda m, args, out: out * 1.0)
    model[0].register_full_backward_hook(lambda m, gi, go: seen.append("module"))
    model[2].weight.register_hook(lambda g: seen.append("parameter"))
    agrees(Problem(model, CE, batches()), reference(build_net(mlp)))
    assert "parameter" not in seen
    assert len(model[0]._forward_hooks) == 1
    assert len(model[0]._backward_hooks) == 1


IMAGES = torch.randn(N, 2, 4, 4, generator=_g).double()


def _shape(*shape):
    return nn.Unflatten(1, shape)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


LAYERS = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "LayerNorm without weights": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "LayerNorm without bias": lambda: nn.LayerNorm(8, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "InstanceNorm": lambda: nn.Sequential(_shape(2, 4), nn.InstanceNorm1d(2, affine=True), nn.Flatten()),
    "BatchNorm": lambda: nn.BatchNorm1d(8).eval(),
    "LocalResponseNorm": lambda: nn.Sequential(_shape(8, 1), nn.LocalResponseNorm(3), nn.Flatten()),
    "normalize": lambda: Apply(lambda x: F.normalize(x, dim=1)),
    "PReLU": lambda: nn.PReLU(8),
    "GELU": lambda: nn.GELU(),
    "GELU by tanh": lambda: nn.GELU(approximate="tanh"),
    "SiLU": lambda: nn.SiLU(),
    "Mish": lambda: nn.Mish(),
    "CELU": lambda: nn.CELU(),
    "SELU": lambda: nn.SELU(),
    "Hardswish": lambda: nn.Hardswish(),
    "LogSigmoid": lambda: nn.LogSigmoid(),
    "Softplus": lambda: nn.Softplus(beta=2),
    "Softmin": lambda: nn.Softmin(1),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "GLU": lambda: nn.Sequential(nn.GLU(), nn.Linear(4, 8)),
    "MaxPool": lambda: nn.Sequential(_shape(2, 4), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 8)),
    "AdaptiveMaxPool": lambda: nn.Sequential(_shape(2, 2, 2), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2, 8)),
    "LPPool": lambda: nn.Sequential(_shape(2, 4), nn.LPPool1d(2, 2), nn.Flatten(), nn.Linear(4, 8)),
    "ConvTranspose": lambda: nn.Sequential(_shape(2, 4), nn.ConvTranspose1d(2, 2, 1), nn.Flatten()),
    "grouped Conv": lambda: nn.Sequential(_shape(2, 2, 2), nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Flatten()),
    "dilated reflecting Conv": lambda: nn.Sequential(
        _shape(2, 4), nn.Conv1d(2, 2, 3, padding=2, dilation=2, padding_mode="reflect"), nn.Flatten()
    ),
    "bilinear Upsample": lambda: nn.Sequential(_shape(2, 2, 2), nn.Upsample(2, mode="bilinear"), nn.Flatten()),
    "bicubic Upsample": lambda: nn.Sequential(
        _shape(2, 2, 2), nn.Upsample(scale_factor=2, mode="bicubic"), nn.Flatten(), nn.Linear(32, 8)
    ),
    "grid_sample": lambda: Apply(
        lambda x: F.grid_sample(x.unflatten(1, (2, 2, 2)), x.tanh().unflatten(1, (2, 2, 2)), align_corners=False).flatten(1)
    ),
    "PixelShuffle": lambda: nn.Sequential(_shape(4, 1, 2), nn.PixelShuffle(2), nn.Flatten()),
    "Unfold": lambda: nn.Sequential(_shape(2, 2, 2), nn.Unfold(2), nn.Flatten()),
    "GRUCell": lambda: nn.GRUCell(8, 8),
    "Bilinear": lambda: Apply2(nn.Bilinear(8, 8, 8)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "cosine similarity": lambda: Apply(lambda x: F.cosine_similarity(x[:, :, None], x.tanh()[:, None], dim=2)),
    "cholesky": lambda: Apply(lambda x: torch.linalg.cholesky(x[:, :, None] * x[:, None] + torch.eye(8)).sum(2)),
    "fft": lambda: Apply(lambda x: torch.fft.rfft(x).abs().repeat(1, 2)[:, :8]),
    "cumprod": lambda: Apply(lambda x: x.cumprod(1)),
    "logsumexp": lambda: Apply(lambda x: x + x.logsumexp(1, keepdim=True)),
    "variance": lambda: Apply(lambda x: x * x.std(1, keepdim=True)),
    "sort": lambda: Apply(lambda x: x.sort(1).values),
    "einsum": lambda: Apply(lambda x: torch.einsum("ni,nj->nj", x, x)),
    "complex product": lambda: Apply(lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(1, (4, 2))) ** 2).flatten(1)),
}  # fmt: skip


class Apply2(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


@pytest.mark.parametrize("layer", LAYERS)
def test_second_derivatives_of_a_layer_equal_differences_of_gradients(layer, build_net, vectors):
    """The reference uses first derivatives only, so that a wrong double backward of torch's own does not hide."""

    def make():
        middle = LAYERS[layer]()
        net = nn.Sequential(nn.Linear(3, 8), nn.Softsign(), middle, nn.Softsign(), nn.Linear(8, 3))
        net.train(middle.training)
        return net

    with torch.random.fork_rng():
        model = build_net(make)
    model[2].eval() if isinstance(model[2], nn.BatchNorm1d) else None
    problem = Problem(model, CE, batches())
    op = lower("hessian", problem)
    V = vectors(problem.size, 2)
    got = op @ V
    assert (V[:, 0] @ got[:, 1] - V[:, 1] @ got[:, 0]).abs() < 1e-9, "not symmetric"
    twin = copy.deepcopy(model)
    parameters = list(twin.parameters())

    def gradient(shift):
        for p, q, part in zip(
            parameters, model.parameters(), shift.split([p.numel() for p in parameters]), strict=True
        ):
            p.data = q.data + part.reshape(p.shape)
        gradients = torch.autograd.grad(CE(twin(X), Y), parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in gradients])

    h = 1e-5
    for v, product_ in zip(V.T, got.T, strict=True):
        expected = (gradient(h * v) - gradient(-h * v)) / (2 * h)
        assert (product_ - expected).norm() < 1e-6 * expected.norm()
    assert torch.allclose(problem.gradient(), gradient(torch.zeros(problem.size).double()), atol=1e-12)
    jacobian = lower("jacobian", problem)
    W = torch.randn(jacobian.shape[0], generator=torch.Generator().manual_seed(0)).double()
    left, right = W @ (jacobian @ V[:, 0]), V[:, 0] @ (jacobian.T @ W)
    assert (left - right).abs() < 1e-9 * (1 + left.abs())


def test_shifted_sums_of_a_troublesome_model(build_net, vectors):
    """Several troubles at once: tied weights, in-place ReLU, frozen dropout, ragged batches, a compiled part."""

    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop, self.head = nn.Linear(3, 3), nn.Dropout(0.3), nn.Linear(3, 3)

        def forward(self, x):
            h = F.relu(self.layer(x), inplace=True)
            return self.head(self.drop(torch.tanh(self.layer(h))))

    model = build_net(Everything).train()
    model.head.compile(backend="aot_eager")
    problem = Problem(model, CE, batches(), randomness="frozen")
    expr = registry.build("hessian") - 2 * registry.build("centered_covariance") + 0.1 * Identity
    op = expr.lower(problem)
    V = vectors(problem.size)
    parts = lower("hessian", problem) @ V - 2 * (lower("centered_covariance", problem) @ V) + 0.1 * V
    for _ in range(3):
        assert torch.allclose(op @ V, parts, atol=1e-12)
    dense = op.to_dense()
    assert torch.allclose(dense, dense.T, atol=1e-12)


@pytest.mark.parametrize("cache", ["auto", 0])
@pytest.mark.parametrize("functional", [False, True])
def test_the_padding_row_of_an_embedding_is_a_constant(functional, cache):
    """Forward AD gives it a tangent although its gradient is zero: kept and fresh products were different matrices."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(6, 3, padding_idx=2), nn.Linear(3, 4)

        def forward(self, x):
            e = nn.functional.embedding(x, self.table.weight, padding_idx=-4) if functional else self.table(x)
            return self.head(torch.tanh(e + 1).sum(1))

    x = torch.tensor([[2, 2, 1], [0, 2, 5], [3, 4, 2]])
    problem = Problem(Tokens().double(), nn.CrossEntropyLoss(), (x, torch.tensor([0, 1, 3])), cache=cache)
    build = registry.build
    for name in ("ggn", "hessian", "covariance"):
        op = build(name).lower(problem)
        rows = torch.stack([op @ e for e in torch.eye(problem.size).double()])
        assert torch.allclose(rows, rows.T, atol=1e-12)
        assert rows[6:9].norm() == 0
    assert build("jacobian").lower(problem).to_dense()[:, 6:9].norm() == 0


def test_a_parameter_without_axes():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x):
            return torch.tanh(self.w * x)

    problem = Problem(Gate(), nn.MSELoss(), (torch.ones(4, 2).double(), torch.zeros(4, 2).double()))
    product = registry.build("hessian").lower(problem) @ {"w": torch.tensor(1.0).double()}
    assert product["w"].shape == ()
    assert problem.layout.unflatten(problem.gradient())["w"].shape == ()
