"""Every sum over the numbers of vectors goes through their space, in one process as well, in few exchanges."""

from __future__ import annotations

import pytest
import torch

from curvalg.solve import cg, lanczos, minres, quadrature
from tests.support.sharded_vectors import (
    CASES,
    DEFINITE,
    SIGNED,
    Doubled,
    Twin,
    Whole,
    basis,
    difference,
    n,
    size_of,
    twin,
)


@pytest.mark.parametrize("name", CASES)
def test_numbers_that_two_processes_hold_count_once(name: str) -> None:
    size = size_of(name)
    assert not (wrong := difference(CASES[name](Doubled(size)), CASES[name](Whole(size)))), wrong


@pytest.mark.parametrize(("width", "most"), [(1, 3), (4, 7)])
def test_a_lanczos_step_takes_few_exchanges(width: int, most: int) -> None:
    space, none = twin(n, seen := Twin()), torch.zeros(0, n, dtype=torch.float64)
    krylov = lanczos.begin(none, none, width, seed=0, capacity=n, space=space)
    for _ in range(5):
        before = seen.exchanges
        krylov = lanczos.extend(krylov, lambda x: SIGNED @ x, width, n)
        assert seen.exchanges - before <= most


@pytest.mark.parametrize(("whole", "most"), [(True, 3), (False, 2)])
def test_a_step_of_recurrences_takes_few_exchanges(whole: bool, most: int) -> None:
    space = twin(n, seen := Twin())
    r = quadrature.begin(basis(n)[:3], whole=whole, capacity=10, space=space)
    for _ in range(10):
        before = seen.exchanges
        r = quadrature.advance(r, lambda x: SIGNED @ x)
        assert seen.exchanges - before <= most


@pytest.mark.parametrize(("method", "most"), [(cg, 3), (minres, 2)])
@pytest.mark.parametrize("noise", [0.0, 1e-12])
def test_an_iteration_takes_few_exchanges(method, most: int, noise: float) -> None:
    def exchanges(count: int) -> int:
        space = twin(n, seen := Twin())
        method(lambda x: DEFINITE @ x, basis(n)[:, :4], rtol=1e-14, maxiter=count, space=space, noise=noise)
        return seen.exchanges

    assert exchanges(20) - exchanges(10) <= 10 * most
