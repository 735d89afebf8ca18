"""What was measured on a model holds for other problems of it, and keeps nothing alive."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from curvalg import Problem, registry
from tests.support.inside import last_wins


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def data(rows=10):
    return torch.randn(rows, 5), torch.randint(0, 3, (rows,))


def multiply(problem, name="covariance", times=12):
    op = registry.build(name).lower(problem)
    for _ in range(times):
        op @ torch.ones(op.shape[1])
    return op


@pytest.fixture(autouse=True)
def _soon(inside):
    inside(routes_after=2)
    inside(patience=4)


def test_another_problem_of_the_model_measures_nothing(inside):
    model = net()
    inside(measure=last_wins)
    first = multiply(Problem(model, nn.CrossEntropyLoss(), data())).explain()
    inside(measure=lambda *_: pytest.fail("measured again"))
    second = multiply(Problem(model, nn.CrossEntropyLoss(), data())).explain()
    assert "multiplied out" in first and "multiplied out, as chosen before" in second


@pytest.mark.parametrize(
    "other",
    [
        lambda model: Problem(net(), nn.CrossEntropyLoss(), data()),
        lambda model: Problem(model, nn.CrossEntropyLoss(), data(rows=20)),
        lambda model: Problem(model, nn.CrossEntropyLoss(), data(), cache=2**20),
        lambda model: Problem(model, nn.MultiMarginLoss(), data(), accumulate=torch.float64),
        lambda model: Problem(model.eval(), nn.CrossEntropyLoss(), data()),
        lambda model: Problem(model, nn.CrossEntropyLoss(), data(), params=["0.weight"]),
    ],
    ids=["another model", "more rows", "other memory", "other options", "another mode", "other parameters"],
)
def test_where_anything_differs_it_is_measured_anew(other, inside):
    model = net()
    multiply(Problem(model, nn.CrossEntropyLoss(), data()))
    measured = []
    inside(measure=lambda candidates, *options: measured.append(1) or last_wins(candidates))
    multiply(other(model))
    assert measured


def test_the_model_is_not_kept_alive():
    model = net()
    multiply(Problem(model, nn.CrossEntropyLoss(), data(), forward=_forward_of(model)))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def _forward_of(model):
    """A rule that holds the model itself."""
    return lambda inner, batch: model(batch[0])


def test_a_problem_is_still_picklable():
    problem = Problem(net(), nn.CrossEntropyLoss(), data())
    multiply(problem)
    multiply(pickle.loads(pickle.dumps(problem)))
