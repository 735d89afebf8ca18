"""``torch.set_default_device("cuda")`` changes nothing: every tensor names its own device, on the CPU and on the device."""

from __future__ import annotations

import pytest
import torch

from curvalg import registry
from curvalg.testing import check_term
from tests.support.device_tables import ESTIMATES, SOLVES, solve
from tests.support.devices import agree, both


@pytest.fixture
def default_device():
    """A function that makes the device the default, until the test is over."""
    before = torch.get_default_device()
    yield torch.set_default_device
    torch.set_default_device(before)


def results(compute, problem):
    found = compute(problem)
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("name", ESTIMATES)
def test_of_estimators(name, default_device):
    wanted = results(ESTIMATES[name], both("mlp")[0])
    problems = both("mlp")
    default_device("cuda")
    for problem in problems:
        for want, got in zip(wanted, results(ESTIMATES[name], problem), strict=True):
            agree(want, got, 1e-7)


@pytest.mark.parametrize("name", SOLVES)
def test_of_solvers(name, default_device):
    want = solve(name, both(SOLVES[name][0])[0])
    problems = both(SOLVES[name][0])
    default_device("cuda")
    for problem in problems:
        agree(want, solve(name, problem))


@pytest.mark.parametrize("name", registry.names())
def test_of_terms(name, default_device):
    def product(problem):
        op = registry.build(name).lower(problem)
        return op @ torch.ones(op.shape[1], dtype=problem.dtype, device=problem.device)

    if name == "empirical_fisher":
        pytest.skip("refused on purpose: the name says what to use")
    want = product(both("mlp")[0])
    problems = both("mlp")
    default_device("cuda")
    for problem in problems:
        agree(want, product(problem))


def test_of_the_conformance_kit(default_device):
    default_device("cuda")
    check_term("ggn_diagonal")
