"""Factorisations against plain torch, and matrices that only rounding gives an inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvalg.errors import FactsError
from curvalg.solve import factorize


def matrix(n, smallest, seed, symmetric, definite):
    """A matrix (n, n) of norm 1 with the smallest singular value given, and n − 1 others from 0.1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator).double())[0] for _ in range(2))
    values = torch.linspace(0.1, 1, n, dtype=torch.float64)
    if not definite:
        values[1::2] *= -1
    values[torch.randint(n, (), generator=generator)] = smallest
    return left @ torch.diag(values) @ (left if symmetric else right).T


KINDS = [(True, True), (True, False), (False, False)]
"""Whether symmetric, and positive."""


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 60),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from([1e-150, 1e-3, 1.0, 1e140]),
    smallest=st.sampled_from([1e-9, 1e-5, 1.0]),
)
def test_solves(n, seed, kind, scale, smallest):
    a = scale * matrix(n, smallest, seed, *kind)
    b = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    x = factorize(a, positive_definite=kind[1])(b)
    wanted = torch.linalg.solve(a / scale, b)
    assert float((x * scale - wanted).norm()) <= 1e-13 * n / smallest * float(wanted.norm())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 60),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from([1e-150, 1.0, 1e140]),
    proved=st.booleans(),
)
def test_a_matrix_without_an_inverse_is_refused(n, seed, kind, scale, proved):
    """Rounding leaves every one a smallest singular value above zero, and some a Cholesky factor."""
    with pytest.raises(FactsError, match="add damping"):
        factorize(scale * matrix(n, 0.0, seed, *kind), positive_definite=proved and kind[0])


@pytest.mark.parametrize("kind", KINDS)
def test_entries_can_be_rounded_more_than_the_arithmetic(kind):
    a = matrix(20, 0.0, 0, *kind).float().double()
    factorize(a, positive_definite=False)
    with pytest.raises(FactsError, match=r"relative errors of 1\.2e-07"):
        factorize(a, positive_definite=False, rounding=torch.finfo(torch.float32).eps)
