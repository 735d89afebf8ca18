"""An operator after its model has changed: refused, and right after a refresh."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from curvalg import (
    ProblemError,
    StaleError,
    registry,
)
from tests.support.zoo import make


def _plain(model):
    opt = torch.optim.SGD(model.parameters(), 0.1)
    _backward(model)
    opt.step()


def _fused(model):
    opt = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    _backward(model)
    opt.step()


def _backward(model):
    model(torch.ones(2, 4).double()).sum().backward()


def _data(model):
    for p in model.parameters():
        p.data = p.data + 0.1


def _vector(model):
    vector_to_parameters(parameters_to_vector(model.parameters()).detach() * 1.1, model.parameters())


def _inplace(model):
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] += 1e-12


def _nan(model):
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan


STEPS = {"plain": _plain, "fused": _fused, "p.data": _data, "vector_to_parameters": _vector, "one bit": _inplace}


@pytest.mark.parametrize("step", STEPS)
def test_stale_after_every_kind_of_step_and_right_after_refresh(step, problem_of, dense_of):
    case = make("mlp")
    op = registry.build("hessian").lower(problem_of(case))
    v = torch.ones(op.shape[0]).double()
    op @ v
    STEPS[step](case.model)
    with pytest.raises(StaleError, match="refresh"):
        op @ v
    for p in case.model.parameters():
        p.grad = None
    from tests.support.dense import Dense

    expected = Dense(case).hessian @ v
    assert op.refresh() is op
    assert torch.allclose(op @ v, expected, atol=1e-12)


def test_stale_names_what_changed_buffers_and_flags_too(problem_of):
    case = make("batchnorm_eval")
    op = registry.build("ggn").lower(problem_of(case))
    v = np.ones(op.shape[0])
    case.model[1].running_mean += 1
    with pytest.raises(StaleError, match="running_mean"):
        op @ v
    op.refresh()
    case.model.train()
    with pytest.raises(StaleError, match="training flags"):
        op @ v
    case.model.eval()
    op @ v  # the state it was lowered at is back


def test_stale_sees_frozen_parameters_and_the_loss(problem_of):
    case = make("frozen_and_unused")
    case.loss = nn.CrossEntropyLoss(weight=torch.ones(3).double())
    op = registry.build("ggn").lower(problem_of(case))
    v = np.ones(op.shape[0])
    with torch.no_grad():
        case.model.frozen.weight.mul_(1.5)
    with pytest.raises(StaleError, match=r"frozen\.weight"):
        op @ v
    op.refresh() @ v
    case.loss.weight[0] = 3.0
    with pytest.raises(StaleError, match="loss"):
        op @ v
    op.refresh() @ v


def test_nan_parameters_are_equal_to_themselves_but_products_are_refused(problem_of):
    case = make("mlp")
    _nan(case.model)
    op = registry.build("ggn").lower(problem_of(case))
    with pytest.raises(ProblemError, match="NaN"):
        op @ np.ones(op.shape[0])


def test_replaced_parameters_and_modules_are_seen_and_taken_up(problem_of):
    from tests.support.dense import Dense

    case = make("mlp")
    op = registry.build("hessian").lower(problem_of(case))
    v = torch.ones(op.shape[0]).double()
    case.model[0].weight = nn.Parameter(case.model[0].weight.detach() * 1.5)
    with pytest.raises(StaleError, match=r"0\.weight"):
        op @ v
    assert torch.allclose(op.refresh() @ v, Dense(case).hessian @ v, atol=1e-12)
    case.model[2] = nn.Linear(5, 3).double()
    with pytest.raises(StaleError, match=r"2\.weight"):
        op @ v
    assert torch.allclose(op.refresh() @ v, Dense(case).hessian @ v, atol=1e-12)
    case.model[0] = nn.Linear(4, 5, bias=False).double()
    with pytest.raises(ProblemError, match="make a new Problem"):
        op.refresh()
