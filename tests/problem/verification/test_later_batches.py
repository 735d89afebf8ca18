"""What is verified, and when: once, at every state, and on a later batch that takes other operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.nn import functional as F

from curvalg import CurvalgError, Problem, ProblemError, block_diagonal, registry
from tests.support.inside import last_wins
from tests.support.small_net import MSE, Net, data


def test_nothing_is_verified_twice(counted_model):
    """Further products cost no model call, and another state one tangent check at most."""
    problem, calls = counted_model("mlp", columns="loop")
    op = registry.build("hessian").lower(problem)
    v = torch.ones(problem.size).double()
    op @ v
    before = calls()
    op @ v
    assert calls() == before
    with torch.no_grad():
        next(problem.model.module.parameters()).mul_(1.1)
    op.refresh() @ v
    assert calls() - before <= len(problem.data.source)


def test_everything_is_a_curvalg_error():
    """Nothing of the checks themselves leaks out of a model that fails on its own."""
    x, y = data()
    with pytest.raises((CurvalgError, ZeroDivisionError)):
        registry.build("ggn").lower(Problem(Net(lambda h: h * (1 / 0)), MSE, (x, y))) @ torch.ones(26).double()


class Strange(nn.Module):
    """A hook that is right for every column alone, and wrong for several in one pass once ``wrong`` is set."""

    def __init__(self):
        super().__init__()
        self.layer, self.wrong = nn.Linear(3, 2).double(), False

    def forward(self, x):
        z = self.layer(x).tanh()
        if z.requires_grad:
            wrong = self.wrong
            z.register_hook(lambda g: 2 * g if wrong and is_legacy_batchedtensor(g) else g)
        return z


def test_columns_are_compared_at_every_state(inside):
    """What was chosen at one state is remembered, and may be wrong at another."""
    inside(measure=last_wins)  # wide is cheap
    model = Strange()
    X, Y, V = torch.randn(6, 3).double(), torch.randn(6, 2).double(), torch.randn(8, 5).double()
    problem = Problem(model, nn.MSELoss(), (X, Y))
    op = registry.build("hessian").lower(problem)
    assert torch.allclose(op @ V, torch.stack([op @ v for v in V.unbind(1)], 1), rtol=1e-10)
    assert "4 at a time" in op.explain()
    model.wrong = True
    op.refresh()
    assert torch.allclose(op @ V, torch.stack([op @ v for v in V.unbind(1)], 1), rtol=1e-10)
    assert "a batched product differs from a single one" in op.explain()


class Experts(nn.Module):
    """Rows with a positive first entry go through a function without a second derivative, or without a forward derivative."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(3, 2).double(), nn.Linear(3, 2).double(), function

    def forward(self, x):
        chosen = x[:, 0] > 0
        z = torch.zeros(len(x), 2).double()
        if (~chosen).any():
            z = z.index_put(((~chosen).nonzero()[:, 0],), self.first(x[~chosen]).tanh())
        if chosen.any():
            z = z.index_put((chosen.nonzero()[:, 0],), self.function(self.second(x[chosen])))
        return z


class Once(torch.autograd.Function):
    """Neither a second derivative nor forward AD."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


@pytest.mark.parametrize("options", [{}, {"cache": 0}, {"columns": "loop"}], ids=str)
@pytest.mark.parametrize("function", [F.hardsigmoid, Once.apply], ids=["hardsigmoid", "once"])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_route_that_fails_on_a_later_batch_is_replaced(function, blocks, options):
    X, y = torch.randn(6, 3).double(), torch.randint(0, 2, (6,))
    X[:3, 0], X[3:, 0] = -1.0, 1.0
    model = Experts(function)
    problem = Problem(model, nn.CrossEntropyLoss(), [(X[:3], y[:3]), (X[3:], y[3:])], **options)
    z = model(X)
    J = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(e, list(model.parameters()), retain_graph=True)])
            for e in z.reshape(-1)
        ]
    )
    p = z.detach().softmax(1)
    B = torch.block_diag(*[(row.diag() - torch.outer(row, row)) / 6 for row in p])
    expected, expr = J.T @ B @ J, registry.build("ggn")
    if blocks:
        expr = block_diagonal(expr)
        expected = torch.block_diag(*[expected[s, s] for s in problem.layout.slices.values()])
    op, V = expr.lower(problem), torch.randn(problem.size, 3).double()
    for _ in range(2):
        assert torch.allclose(op @ V[:, 0], expected @ V[:, 0], rtol=1e-9)
        assert torch.allclose(op @ V, expected @ V, rtol=1e-9)


class Wrong(torch.autograd.Function):
    """x, with a derivative of 3."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class Squared(torch.autograd.Function):
    """x², with a wrong second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * Wrong.apply(ctx.saved_tensors[0]) * g


def test_a_check_that_failed_fails_again():
    """What was refused once must not be believed the second time."""

    class Net(nn.Linear):
        def forward(self, x):
            return Squared.apply(super().forward(x))

    problem = Problem(Net(3, 2).double(), nn.MSELoss(), (torch.randn(4, 3).double(), torch.randn(4, 2).double()))
    op = registry.build("hessian").lower(problem)
    for _ in range(3):
        with pytest.raises(ProblemError, match="second derivatives"):
            op @ torch.ones(8).double()


class WrongForward(torch.autograd.Function):
    """x³, whose tangents are doubled."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g

    @staticmethod
    def jvp(ctx, t):
        return 6 * ctx.saved_tensors[0] ** 2 * t


@pytest.mark.parametrize("options", [{}, {"cache": 0}], ids=str)
def test_operations_of_a_later_batch_are_verified_there(options):
    X, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    X[:3, 0], X[3:, 0] = -1.0, 1.0
    data, v = [(X[:3], y[:3]), (X[3:], y[3:])], torch.randn(16).double()
    right, wrong = Experts(lambda x: x**3), Experts(WrongForward.apply)
    wrong.load_state_dict(right.state_dict())
    for columns in (v, torch.stack([v, 2 * v], 1)):
        expected, got = (
            registry.build("ggn").lower(Problem(m, nn.MSELoss(), data, **options)) @ columns for m in (right, wrong)
        )
        assert torch.allclose(got, expected, rtol=1e-10)
    op = registry.build("hessian").lower(Problem(Experts(Squared.apply), nn.MSELoss(), data, **options))
    for _ in range(2):
        with pytest.raises(ProblemError, match="second derivatives"):
            op @ v
