"""Values and matrices of models of real libraries are those of plain torch on the library's own loss."""

from __future__ import annotations

import pytest
import torch

from curvalg import registry
from tests.support.models import others, zoo

NAMES = [maker.__name__ for maker in (*zoo.TRANSFORMERS, *others.OTHERS)]
ERROR = 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_the_value_is_the_mean_loss_of_the_library(name, real):
    model = real(name)
    assert model.problem().value() == pytest.approx(model.value(), rel=1e-12)
    (first, *_) = model.batches
    assert model.problem([first]).value() == pytest.approx(model.loss(first).item(), rel=1e-12)


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "covariance"])
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_plain_torch(name, matrix, real):
    model = real(name)
    problem = model.problem()
    v = torch.randn(problem.size, dtype=torch.float64)
    expected = getattr(model, matrix)(v)
    operator = registry.build(matrix).lower(problem)
    for product in (operator @ v, operator @ v):  # recorded, and replayed
        assert float((product - expected).norm() / expected.norm()) <= ERROR


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_trained_is_chosen(name, real):
    model = real(name)
    assert model.problem().size == sum(p.numel() for p in model.parameters)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_model_changes(name, real):
    model = real(name)
    state = {key: value.clone() for key, value in model.model.state_dict().items()}
    problem = model.problem()
    registry.build("hessian").lower(problem) @ torch.ones(problem.size, dtype=torch.float64)
    assert all(torch.equal(value, state[key]) for key, value in model.model.state_dict().items())
    assert all(p.grad is None for p in model.parameters)
