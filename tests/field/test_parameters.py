"""Parameters: unused, frozen, tied, ignored by a callable, not contiguous."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import CurvalgWarning, Problem, ProblemError, registry
from tests.support.field.models import (
    CE,
    TERMS,
    N,
    X,
    Y,
    batches,
    lower,
    mlp,
    product,
    reference,
    rng,
)

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
