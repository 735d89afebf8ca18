"""What it costs to find the fastest way: counted in calls of the model and backward passes, never by the clock."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Problem, block_diagonal, registry
from tests.support.inside import last_wins

FIRST, ORDINARY = 5, 2
"""Backward passes of the first product of a first-order matrix (a graph, its double, its check, two for the product), and of
every other."""


@pytest.fixture
def backwards(monkeypatch):
    """Counts backward passes, and gives their number since it was asked last."""
    count, grad = [0], torch.autograd.grad

    def counted(*args, **options):
        count[0] += 1
        return grad(*args, **options)

    def since():
        passed, count[0] = count[0], 0
        return passed

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return since


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def problem(**options):
    torch.manual_seed(1)
    return Problem(net(), nn.CrossEntropyLoss(), (torch.randn(12, 6), torch.randint(0, 3, (12,))), **options)


@pytest.mark.parametrize("name", ["ggn", "covariance"])
def test_nothing_is_raced_before_products_have_paid_for_it(name, backwards, inside):
    op = registry.build(name).lower(problem())
    v = torch.randn(op.shape[1])
    costs = []
    for _ in range(40):
        op @ v
        costs.append(backwards())
    assert costs[0] <= FIRST
    assert costs[1 : inside["routes_after"]] == [ORDINARY] * (inside["routes_after"] - 1)
    # Forward AD is verified by one backward pass; how long the other route takes was seen in the products before.
    assert costs[inside["routes_after"]] == ORDINARY + 1
    assert max(costs[1:]) <= 3 * ORDINARY + 3
    assert sum(costs) <= 40 * ORDINARY + 3 + 3 + FIRST


@pytest.mark.parametrize("name", ["ggn", "covariance"])
def test_blocks_are_compared_with_one_backward_pass_and_not_with_one_for_each(name, backwards, inside):
    inside(measure=last_wins)

    def first(by):
        op = block_diagonal(registry.build(name), by=by).lower(problem())
        backwards()
        op @ torch.randn(op.shape[1])
        return backwards()

    few, many = first("module"), first("parameter")
    assert many == few <= 12


def test_columns_that_are_wrong_are_found_out_by_the_backward_pass(monkeypatch):
    from curvalg.problem.model.layer_record import LayerRecord

    expected = block_diagonal(registry.build("ggn"), by="module").lower(problem()).to_dense()
    for planted in ("project", "combine"):
        with monkeypatch.context() as patch:
            for kind in _kinds(LayerRecord):
                if planted in vars(kind):
                    right = vars(kind)[planted]
                    patch.setattr(kind, planted, lambda self, x, right=right: _scaled(right(self, x)))
            op = block_diagonal(registry.build("ggn"), by="module").lower(problem())
            assert torch.allclose(op @ torch.eye(op.shape[1]), torch.as_tensor(expected), atol=1e-5)
            assert "not factored: its" in op.explain()


def _kinds(kind):
    return [kind, *(each for below in kind.__subclasses__() for each in _kinds(below))]


def _scaled(found):
    return {name: 1.01 * t for name, t in found.items()} if isinstance(found, dict) else 1.01 * found


def test_second_derivatives_are_compared_on_one_side_where_that_agrees():
    model, calls = net(), []
    model.register_forward_hook(lambda *_: calls.append(None))
    torch.manual_seed(1)
    data = torch.randn(12, 6), torch.randint(0, 3, (12,))
    op = registry.build("hessian").lower(Problem(model, nn.CrossEntropyLoss(), data))
    op @ torch.randn(op.shape[1])
    assert len(calls) <= 4  # recorded, called once more, in double precision at the state, and beside it


@pytest.mark.parametrize("rows", [2, 24])
def test_second_derivatives_of_few_parameters_are_compared_on_few_rows_where_these_save_work(rows):
    """A convolution has hardly any parameters, and much work for each row."""
    model, seen = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 2, 3), nn.Flatten()), []
    model.register_forward_hook(lambda _, given, __: seen.append((given[0].dtype, len(given[0]))))
    data = torch.randn(rows, 3, 32, 32), torch.randn(rows, 2 * 28 * 28)
    op = registry.build("hessian").lower(Problem(model, nn.MSELoss(), data))
    op @ torch.randn(op.shape[1])
    assert {number for dtype, number in seen if dtype == torch.float64} == {2}


def test_columns_that_fit_by_far_are_pulled_without_trying_one(backwards, inside):
    """Their bytes are known from the outputs of the layers: a column of its own, to be weighed, would cost a backward pass."""
    inside(measure=last_wins)

    def first(**options):
        op = block_diagonal(registry.build("ggn"), by="module").lower(problem(**options))
        backwards()
        op @ torch.randn(op.shape[1])
        return backwards()

    assert first(cache=9_000) == first() + 1  # two columns of 576 bytes fit there, but not by far
