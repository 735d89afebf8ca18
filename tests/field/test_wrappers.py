"""Models inside something else: compiled, checkpointed, parallel, scripted, hooked."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from curvalg import Problem, ProblemError, registry
from tests.support.field.models import (
    CE,
    X,
    Y,
    batches,
    lower,
    mlp,
    ones,
    product,
    reference,
)

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
def test_distributed_data_parallel_wrappers_are_unwrapped(build_net, agrees, process_group):
    model = build_net(mlp)
    wrapped = nn.parallel.DistributedDataParallel(model)
    problem = Problem(wrapped, CE, batches())
    assert problem.layout.names[0] == "0.weight"
    agrees(problem, reference(build_net(mlp)))
    CE(wrapped(X), Y).backward()  # its hooks still work
    assert all(p.grad is not None for p in model.parameters())


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
