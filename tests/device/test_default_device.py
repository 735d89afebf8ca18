"""``torch.set_default_device("cuda")`` changes nothing: every tensor names its own device, for problems on either."""

from __future__ import annotations

import pytest
import torch

from curvalg import registry
from curvalg.testing import check_term, default_problems
from tests.support.device_tables import ESTIMATES, SOLVES, estimated, estimated_on_the_cpu, solve, solved_on_the_cpu
from tests.support.devices import agree, both, in_turn


@pytest.fixture
def default_device():
    """A function that makes the device the default, until the test is over."""
    before = torch.get_default_device()
    yield torch.set_default_device
    torch.set_default_device(before)


@pytest.mark.parametrize(("name", "at"), in_turn(list(ESTIMATES), [0, 1]))
def test_of_estimators(name, at, default_device):
    wanted, problem = estimated_on_the_cpu(name), both("mlp")[at]
    default_device("cuda")
    for want, got in zip(wanted, estimated(name, problem), strict=True):
        agree(want, got, 1e-7)


@pytest.mark.parametrize(("name", "at"), in_turn(list(SOLVES), [1, 0]))
def test_of_solvers(name, at, default_device):
    want, problem = solved_on_the_cpu(name), both(SOLVES[name][0])[at]
    default_device("cuda")
    agree(want, solve(name, problem))


@pytest.mark.parametrize(
    ("name", "at"), in_turn([name for name in registry.names() if name != "empirical_fisher"], [0, 1])
)
def test_of_terms(name, at, default_device):
    def product(problem):
        op = registry.build(name).lower(problem)
        return op @ torch.ones(op.shape[1], dtype=problem.dtype, device=problem.device)

    want, problem = product(both("mlp")[0]), both("mlp")[at]
    default_device("cuda")
    agree(want, product(problem))


def test_of_the_conformance_kit(default_device):
    default_device("cuda")
    check_term("ggn_diagonal", problems=default_problems("regression"))
