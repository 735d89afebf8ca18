"""The contract of terms, check by check, and a reference."""

import torch

from curvalg import registry
from curvalg.testing import default_problems, parametrize_terms


@parametrize_terms(["jacobian_gram(scale=2)"], processes=True)
def test_conformance(term, check):
    check(term)


def test_matrix():
    problem = default_problems()[0]
    jacobian = registry.build("jacobian").lower(problem).to_dense()
    torch.testing.assert_close(
        registry.build("jacobian_gram").lower(problem).to_dense(), jacobian.T @ jacobian
    )
