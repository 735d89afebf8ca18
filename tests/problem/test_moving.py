"""Problems on other data, and steps of the parameters: what an optimiser does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from curvalg import Identity, OptionError, Problem, ProblemError, StaleError, VectorError, inverse, registry

build = registry.build


def made(dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    X, y = torch.randn(20, 3, dtype=dtype), torch.randint(2, (20,))
    return net, X, y, Problem(net, nn.CrossEntropyLoss(), (X, y))


@pytest.mark.parametrize("term", ["hessian", "ggn", "covariance", "kfac", "ggn_mc(samples=2)"])
def test_other_data_give_the_matrix_of_a_problem_of_its_own(term):
    from curvalg import parse

    net, X, y, problem = made()
    parse(term).lower(problem) @ torch.ones(problem.size).double()
    batch = problem.with_data((X[:7], y[:7]))
    alone = Problem(net, nn.CrossEntropyLoss(), (X[:7], y[:7]))
    assert batch.num_samples == 7
    assert batch.value() == pytest.approx(alone.value())
    torch.testing.assert_close(parse(term).lower(batch).to_dense(), parse(term).lower(alone).to_dense())
    assert problem.num_samples == 20  # as before


def test_options_and_selections_stay():
    net, X, y, _ = made()
    problem = Problem(net, nn.CrossEntropyLoss(), (X, y), params=["2.*"], cache=0, verify=False)
    batch = problem.with_data([(X[:5], y[:5]), (X[5:8], y[5:8])])
    assert (batch.size, batch.cache, batch.verify, batch.num_samples) == (10, 0, False, 8)
    inner = made()[3].restricted(["0.*"])
    assert inner.with_data((X[:5], y[:5])).layout.names == ["0.weight", "0.bias"]


def test_what_is_verified_is_not_verified_again(inside):
    _, X, y, problem = made()
    build("hessian").lower(problem) @ torch.ones(problem.size).double()
    checked = problem.snapshot().structure.found.sworn
    assert "curvature" in checked
    assert "curvature" in problem.with_data((X[:5], y[:5])).snapshot().structure.found.sworn


def test_other_data_are_read_as_strictly():
    _, X, _, problem = made()
    with pytest.raises(ProblemError, match="read only once"):
        problem.with_data(iter([(X, X)]))
    with pytest.raises(ProblemError):
        problem.with_data(X).value()


@pytest.mark.parametrize("kind", ["tensor", "array", "dict", "list"])
def test_a_step_moves_the_live_parameters(kind):
    net, _, _, problem = made()
    direction = problem.gradient()
    before = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    tree = problem.layout.unflatten(direction)
    given = {"tensor": direction, "array": direction.numpy(), "dict": tree, "list": list(tree.values())}[kind]
    value = problem.value()
    assert problem.step(given, 0.1) is problem
    after = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    assert torch.equal(after, before - 0.1 * direction)
    assert problem.value() < value
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_step_makes_operators_stale():
    _, _, _, problem = made()
    op = build("ggn").lower(problem)
    op @ problem.gradient()
    problem.step(problem.gradient())
    with pytest.raises(StaleError):
        op @ problem.gradient()


def test_steps_of_half_precision_are_rounded_once():
    torch.manual_seed(0)
    net = nn.Linear(30, 1, bias=False).to(torch.bfloat16)
    problem = Problem(net, nn.MSELoss(), (torch.randn(5, 30, dtype=torch.bfloat16), torch.randn(5, 1)))
    before, direction = net.weight.detach().float().reshape(-1), torch.rand(30)
    problem.step(direction, 1e-2)
    assert torch.equal(net.weight.detach().reshape(-1), (before - 1e-2 * direction).to(torch.bfloat16))


def test_wrong_steps_move_nothing():
    net, _, _, problem = made()
    before = [p.detach().clone() for p in net.parameters()]
    for wrong in (
        torch.ones(3).double(),
        torch.ones(problem.size, 1).double(),
        torch.ones(problem.size, dtype=torch.long),
    ):
        with pytest.raises(VectorError):
            problem.step(wrong)
    with pytest.raises(VectorError, match="not finite"):
        problem.step(np.full(problem.size, np.nan))
    for size in (float("nan"), True, "1"):
        with pytest.raises(OptionError, match="size"):
            problem.step(problem.gradient(), size)
    assert all(torch.equal(a, p) for a, p in zip(before, net.parameters(), strict=True))


def test_natural_gradient_on_minibatches():
    _, X, y, problem = made()
    before, damped = problem.value(), build("ggn") + 0.1 * Identity
    for rows in torch.arange(20).split(5):
        batch = problem.with_data((X[rows], y[rows]))
        batch.step(inverse(damped).lower(batch) @ batch.gradient(), 0.5)
    assert problem.value() < before


def test_rows_of_another_length_have_columns_of_their_own():
    net, ggn = nn.Linear(3, 4).double(), build("ggn")

    def data(length):
        return torch.randn(2, length, 3).double(), torch.randint(4, (2, length))

    problem = Problem(net, nn.CrossEntropyLoss(), data(5), forward=lambda model, batch: model(batch[0]).transpose(1, 2))
    assert problem.factor_columns(ggn) == 5 * 3
    assert problem.with_data(data(9)).factor_columns(ggn) == 9 * 3
    assert problem.factor_columns(ggn) == 5 * 3


def test_what_is_verified_on_other_data_is_verified_for_all():
    """Problems for every minibatch learn from each other: from the second on a matrix costs one call of the model."""
    net, X, y, problem = made()
    calls, counted = [], []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    for rows in torch.arange(20).split(10):
        batch = problem.with_data((X[rows], y[rows]))
        calls.clear()
        build("kfac").bound(batch)
        counted.append(len(calls))
    assert counted[1] == 1 < counted[0]


def test_steps_copy_the_parameters_once():
    """The state of a problem on other data shares its copies with the one that it came from."""
    _, X, y, problem = made()
    batch = problem.with_data((X[:5], y[:5]))
    theirs, ours = batch.snapshot().state, problem.snapshot().state
    assert all(theirs[name] is ours[name] for name in ours)
    batch.step(torch.ones(batch.size).double())
    assert batch.snapshot().state["0.weight"] is not ours["0.weight"]


class Mixes(nn.Module):
    """A model whose rows depend on each other in batches of nine."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.c(h - h.mean(0) if len(x) == 9 else h)


@pytest.mark.parametrize("term", ["kfac", "ggn_diagonal", "ekfac", "covariance"])
def test_operations_that_only_later_batches_have_are_looked_at(term):
    torch.manual_seed(0)
    net, loss = Mixes().double(), nn.CrossEntropyLoss()
    apart, mixed = ((torch.randn(n, 4).double(), torch.randint(0, 3, (n,))) for n in (12, 9))

    def diagonal(problem):  # parameters that are known to have no factors may lie in one block or in several
        return build(term).lower(problem).to_dense().diagonal()

    first = Problem(net, loss, apart)
    diagonal(first)
    torch.testing.assert_close(diagonal(first.with_data(mixed)), diagonal(Problem(net, loss, mixed)))


class TwoPrecisions(nn.Module):
    """A layer in double precision, and one in single precision that its output is cast for."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)).float())


def test_models_of_two_precisions_are_multiplied_where_no_difference_can_be_taken():
    torch.manual_seed(0)
    net, X, y = TwoPrecisions(), torch.randn(5, 4).double(), torch.randint(0, 3, (5,))
    v = torch.randn(43).double()
    checked, unchecked = (
        build("hessian").lower(Problem(net, nn.CrossEntropyLoss(), (X, y), verify=verify)) @ v
        for verify in (True, False)
    )
    torch.testing.assert_close(checked, unchecked)
