"""Per-sample gradients: equal on every route, and every route that would be wrong is declined."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Problem, ProblemError, registry
from curvalg.problem.layers import PerSampleNotes
from tests.support.zoo import ZOO, make

LAST = "one backward per sample"
ROUTES = ["BackPACK", "torch.func", LAST]


def gradients(problem):
    snapshot = problem.snapshot()
    with problem.differentiating():
        return [e.evaluate().per_sample_gradients() for e in problem.evaluations(snapshot)]


def rows(problem, found):
    return torch.cat([torch.cat([g.reshape(len(g), -1) for g in batch.values()], 1) for batch in found])


@pytest.mark.parametrize("model", sorted(set(ZOO) - {"batchnorm_training"}))
def test_equal_to_dense_on_whatever_route(model, problem_of, dense_of):
    problem = problem_of(model)
    expected = dense_of(model).rows
    assert (rows(problem, gradients(problem)) - expected).norm() <= 1e-10 * expected.norm()


ROUTE = {
    "linear": "BackPACK",
    "mlp": "BackPACK",
    "cnn": "BackPACK",
    "sequence_classes_second": "torch.func",
    "attention_softmax": "torch.func",
    "tied_embedding": "torch.func",
    "two_names": "torch.func",
    "reused_weight": "torch.func",
    "several_outputs": "torch.func",
}


@pytest.mark.parametrize("model", ROUTE)
def test_expected_route(model, problem_of):
    problem = problem_of(model)
    gradients(problem)
    assert problem.noted(PerSampleNotes).route == ROUTE[model], problem.noted(PerSampleNotes).declined


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
@pytest.mark.parametrize("route", ROUTES)
def test_routes_agree(model, route, problem_of, dense_of):
    problem = problem_of(model)
    problem.noted(PerSampleNotes).route = route
    expected = dense_of(model).rows
    assert (rows(problem, gradients(problem)) - expected).norm() <= 1e-10 * expected.norm()


def test_positions(problem_of):
    problem = problem_of("sequence_classes_second", samples="position")
    found = rows(problem, gradients(problem))
    covariance = registry.build("covariance").lower(problem).to_dense()
    assert found.shape[0] == problem.num_samples == 21
    assert (21 * found.T @ found - covariance).norm() <= 1e-10 * covariance.norm()


def test_rows_that_need_each_other_take_the_last_route(problem_of):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            z = self.layer(x)
            return z - z.mean(0) / 2

    case = make("mlp")
    case.model = Mixing().double()
    problem = problem_of(case)
    found = rows(problem, gradients(problem))
    covariance = registry.build("covariance").lower(problem).to_dense()
    assert problem.noted(PerSampleNotes).route == LAST
    assert any("do not add up" in note for note in problem.noted(PerSampleNotes).declined)
    assert (7 * found.T @ found - covariance).norm() <= 1e-10 * covariance.norm()


def test_batch_axis_that_is_not_first(problem_of):
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(2, 3), nn.Linear(3, 3)

        def forward(self, x):  # as many steps as rows: a wrong axis has the right shape and the right sum
            h = torch.tanh(self.layer(x.transpose(0, 1)).cumsum(0))
            return self.head(h[-1] + h[0])

    case = make("mlp")
    case.model = TimeFirst().double()
    X, y = torch.randn(4, 4, 2).double(), torch.tensor([0, 1, 2, 1])
    problem = problem_of(case, (X, y))
    found = rows(problem, gradients(problem))
    covariance = registry.build("covariance").lower(problem).to_dense()
    assert (4 * found.T @ found - covariance).norm() <= 1e-10 * covariance.norm()


def test_training_batchnorm_is_refused(problem_of):
    with pytest.raises(ProblemError, match="batch statistics"):
        gradients(problem_of("batchnorm_training"))


def test_backpack_leaves_the_users_modules_alone(problem_of):
    case = make("cnn")
    before = {n: set(vars(m)) for n, m in case.model.named_modules()}
    problem = problem_of(case)
    gradients(problem)
    assert problem.noted(PerSampleNotes).route == "BackPACK"
    for name, module in case.model.named_modules():
        assert set(vars(module)) == before[name]
        assert not module._forward_hooks and not module._backward_hooks and not module._forward_pre_hooks
    for p in case.model.parameters():
        assert p.grad is None and not hasattr(p, "grad_batch")


class Neighbours(torch.nn.Module):
    """Two rows of pairs beside the data, which are no samples although a batch may have two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2).double()

    def forward(self, given):
        x, pairs = given
        return (x + pairs[1].double()) @ self.layer.weight.exp().T


def test_a_route_that_fails_on_a_later_batch_is_replaced():
    x, y = torch.randn(3, 3).double(), torch.randn(3, 2).double()
    pairs = torch.tensor([[0, 1, 2], [2, 0, 1]])
    problem = Problem(Neighbours(), torch.nn.MSELoss(), [((x[:1], pairs), y[:1]), ((x[1:], pairs), y[1:])])
    with problem.batches() as batches:
        got = torch.cat([batch.per_sample_gradients()["layer.weight"].flatten(1) for batch in batches])
    model = problem.model.module
    losses = (model((x, pairs)) - y).square().sum(1) / y.numel()
    expected = [torch.autograd.grad(loss, model.layer.weight, retain_graph=True)[0].flatten() for loss in losses]
    assert (got - torch.stack(expected)).norm() <= 1e-12
    notes = problem.noted(PerSampleNotes)
    assert notes.route == "one backward per sample" and any("torch.func" in reason for reason in notes.declined)


def test_no_gradients_are_left_on_anything_that_the_forward_reaches():
    torch.manual_seed(0)
    model, teacher = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    data = (torch.randn(4, 3).double(), torch.randn(4, 2).double())
    problem = Problem(model, nn.MSELoss(), data, forward=lambda m, batch: m(batch[0]) * teacher(batch[0]))
    with problem.batches() as batches:
        next(iter(batches)).per_sample_gradients()
    assert problem.noted(PerSampleNotes).route == "BackPACK"
    assert all(p.grad is None for p in (*model.parameters(), *teacher.parameters()))
