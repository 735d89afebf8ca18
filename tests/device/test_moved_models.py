"""A model that is moved after its problem was made: old operators say so, and a refresh goes on at the new device."""

from __future__ import annotations

import copy

import pytest
import torch

from curvalg import CurvalgError, Identity, Problem, StaleError, inverse, registry, restrict
from curvalg.estimate import trace
from tests.support.devices import agree, both, in_turn
from tests.support.zoo import make

BUILD = registry.build
DEVICES = [("cpu", "cuda"), ("cuda", "cpu")]
EXPRESSIONS = {
    "ggn": BUILD("ggn"),
    "covariance": BUILD("covariance"),
    "kfac": BUILD("kfac"),
    "inverse of kfac": inverse(BUILD("kfac") + Identity),
    "gram": inverse(BUILD("covariance") + Identity, solver="gram"),
    "cg": inverse(BUILD("ggn") + Identity, solver="cg"),
    "jacobian": BUILD("jacobian"),
}


def ones(op, device=None):
    return torch.ones(op.shape[1], dtype=torch.float64, device=device or op.device)


@pytest.mark.parametrize(("name", "devices"), in_turn(list(EXPRESSIONS), DEVICES))
def test_an_operator_goes_on_where_the_model_is(name, devices):
    first, second = devices
    case = make("mlp")
    want = EXPRESSIONS[name].lower(both("mlp")[0])
    problem = Problem(case.model.to(first), case.loss, case.batches)
    op = EXPRESSIONS[name].lower(problem)
    for _ in range(3):
        agree(want @ ones(want), op @ ones(op))
    case.model.to(second)
    for device in (first, second):
        with pytest.raises(StaleError):
            op @ ones(op, device)
    op.refresh()
    assert op.device.type == problem.device.type == second
    for _ in range(3):
        got = op @ ones(op)
        assert got.device.type == second
        agree(want @ ones(want), got)
    case.model.to(first)  # and back
    with pytest.raises(StaleError):
        op @ ones(op)
    agree(want @ ones(want), op.refresh() @ ones(op))


def test_value_gradient_and_new_operators_follow_at_once():
    case = make("mlp")
    problem = Problem(case.model, case.loss, case.batches)
    value, gradient, exact = problem.value(), problem.gradient(), trace(BUILD("kfac").lower(problem)).value
    case.model.cuda()
    assert problem.value() == pytest.approx(value, rel=1e-12)
    agree(gradient, problem.gradient())
    assert problem.gradient().is_cuda
    assert "cuda" in repr(problem)
    assert trace(BUILD("kfac").lower(problem)).value == pytest.approx(exact, rel=1e-9)


def test_what_is_kept_is_let_go_and_the_budget_is_of_the_new_device():
    case = make("mlp")
    problem = Problem(case.model, case.loss, case.batches)
    op = BUILD("hessian").lower(problem)
    op @ ones(op)
    before, limit = problem.budget.used, problem.budget.limit
    assert before
    case.model.cuda()
    op.refresh()
    op @ ones(op)
    assert 0 < problem.budget.used <= 2 * before
    assert problem.budget.limit == Problem(case.model, case.loss, case.batches).budget.limit != limit
    assert problem.measured.device == problem.device


def test_a_model_that_was_moved_while_an_operator_was_made_of_some_parameters():
    case = make("mlp")
    problem = Problem(case.model, case.loss, case.batches, params=["0.*"])
    op = restrict(BUILD("ggn"), ["0.weight"]).lower(problem)
    want = op @ ones(op)
    case.model.cuda()
    agree(want, op.refresh() @ ones(op))


def test_a_loss_with_tensors_moves_too():
    case, weight = make("mlp"), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    loss = torch.nn.CrossEntropyLoss(weight=weight)
    problem = Problem(copy.deepcopy(case.model), loss, case.batches)
    op = BUILD("ggn").lower(problem)
    want = op @ ones(op)
    problem.model.module.cuda()
    loss.cuda()
    agree(want, op.refresh() @ ones(op))


def test_a_part_that_was_moved_is_refused_by_name():
    case = make("mlp")
    problem = Problem(case.model, case.loss, case.batches)
    op = BUILD("ggn").lower(problem)
    case.model[2].cuda()
    with pytest.raises(StaleError):
        op @ ones(op)
    with pytest.raises(
        CurvalgError, match=r"several devices: cpu has 0\.weight, 0\.bias; cuda:0 has 2\.weight, 2\.bias"
    ):
        op.refresh()
    case.model.cpu()
    assert op.refresh().device.type == "cpu"
