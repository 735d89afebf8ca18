"""Races start only where enough products are to come."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from curvalg import Identity, Problem, inverse, registry
from curvalg.estimate import trace


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    data = torch.randn(12, 6), torch.randint(0, 3, (12,))
    return Problem(net, nn.CrossEntropyLoss(), data, factored=False, columns="loop")


def tried(problem):
    """Whether the routes to tangents were compared."""
    return any(name.startswith("tangents of") for name in problem.measured.choices)


def multiply(op, times):
    for _ in range(times):
        op @ torch.ones(op.shape[1])


def test_a_loop_of_products_starts_a_race(problem, inside):
    multiply(registry.build("ggn").lower(problem), inside["routes_after"])
    assert not tried(problem)
    multiply(registry.build("ggn").lower(problem), 2)
    assert tried(problem)


@pytest.mark.parametrize(("left", "starts"), [(1, False), (7, False), (8, True)])
def test_a_race_starts_only_where_enough_products_are_announced(problem, inside, left, starts):
    op = registry.build("ggn").lower(problem)
    multiply(op, inside["routes_after"])
    with problem.measured.expected.at_most(left):
        multiply(op, 2)
    assert tried(problem) is starts


@pytest.mark.parametrize(("iterations", "starts"), [(3, False), (40, True)])
def test_an_iterative_solve_announces_its_iterations(problem, inside, iterations, starts):
    op = registry.build("ggn").lower(problem)
    multiply(op, inside["routes_after"])
    solve = inverse(registry.build("ggn") + 1e-2 * Identity, solver="cg", maxiter=iterations, on_fail="warn")
    with pytest.warns() if iterations < 10 else nullcontext():
        solve.lower(problem) @ torch.ones(problem.size)
    assert tried(problem) is starts


def test_without_an_announcement_as_many_are_expected_as_were_made(problem):
    assert problem.measured.expected.coming(7) == 7


def test_an_announcement_is_an_upper_bound_and_ends(problem):
    expected = problem.measured.expected
    with expected.at_most(3):
        assert (expected.coming(2), expected.coming(7)) == (2, 3)
        with expected.at_most(5):
            assert expected.coming(7) == 5
        assert expected.coming(7) == 3
    with pytest.raises(KeyboardInterrupt), expected.at_most(3):
        raise KeyboardInterrupt
    assert expected.coming(7) == 7


def test_parameters_of_a_problem_share_what_is_expected(problem):
    with problem.measured.expected.at_most(3):
        assert problem.restricted(["0.weight"]).measured.expected.coming(7) == 3


def test_an_estimator_announces_what_is_left(problem, monkeypatch):
    expected, announced = problem.measured.expected, []
    at_most = expected.at_most
    monkeypatch.setattr(expected, "at_most", lambda products: announced.append(products) or at_most(products))
    trace(registry.build("hessian").lower(problem), products=10)
    assert announced and max(announced) <= 10
