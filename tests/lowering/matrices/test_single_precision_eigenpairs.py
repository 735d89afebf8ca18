"""Eigenvectors of matrices in single precision whose eigenvalues nearly coincide: found in double, and rounded afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Diagonal, Identity, Kronecker, LowRank, Problem, inv_sqrt, inverse, registry, sqrt
from curvalg.solve import eigenpairs

GGN = registry.build("ggn")
ROWS = 4
"""Samples, so that the Gram matrix of the squared loss is small."""


def nearly_degenerate(size, seed, spread=1e-6):
    """A symmetric positive definite float32 matrix, all of whose eigenvalues are 1 but for a millionth."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    matrix = basis @ torch.diag(1 + spread * torch.linspace(0, 1, size, dtype=torch.float64)) @ basis.T
    return ((matrix + matrix.T) / 2).float()


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return Problem(nn.Linear(59, 4), nn.MSELoss(), (torch.randn(ROWS, 59), torch.randn(ROWS, 4)))


LEFT, RIGHT = nearly_degenerate(4, 0), nearly_degenerate(60, 1)
BLOCKS = {
    "kronecker": Kronecker(LEFT, RIGHT),
    "damped kronecker": Kronecker(LEFT, RIGHT) + 0.5 * Identity,
    "low rank": LowRank(torch.linalg.qr(torch.randn(240, 60))[0], RIGHT) + 0.5 * Identity,
    "dense": Kronecker(LEFT, RIGHT) + Diagonal(torch.linspace(1, 1 + 1e-6, 240)),
    "gram": GGN + 1e-3 * Identity,
}


def orthogonality(vectors):
    vectors = vectors.double()
    return float((vectors.T @ vectors - torch.eye(vectors.shape[1])).norm())


@pytest.mark.parametrize("name", BLOCKS)
def test_eigenvectors_are_orthonormal_to_single_precision(name, problem):
    pairs = BLOCKS[name].lower(problem).exact("eigh")
    vectors = pairs.vectors(slice(None))
    own = orthogonality(torch.linalg.eigh(RIGHT)[1])
    assert len(pairs.eigenvalues) in (60, 240, 4 * ROWS)
    assert orthogonality(vectors) < (own if name == "gram" else own / 3)


@pytest.mark.parametrize("name", ["kronecker", "damped kronecker", "low rank", "dense"])
def test_functions_are_as_exact_as_float32_can_hold_them(name, problem):
    expr = BLOCKS[name]
    matrix = expr.lower(problem).to_dense().double()
    values, vectors = torch.linalg.eigh(matrix)
    x = torch.eye(240)
    for function, mapped in ((sqrt, values.sqrt()), (inverse, values.reciprocal()), (inv_sqrt, values.rsqrt())):
        wanted = (vectors * mapped) @ vectors.T
        assert float(((function(expr).lower(problem) @ x).double() - wanted).norm() / wanted.norm()) < 3e-7


def test_eigenpairs_of_single_precision_are_those_of_double_rounded():
    values, vectors = eigenpairs(RIGHT)
    exact = torch.linalg.eigh(RIGHT.double())
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.equal(values, exact[0].float()) and torch.equal(vectors, exact[1].float())
    own = torch.linalg.eigh(RIGHT)
    assert (own[0] - exact[0]).abs().max() > 3 * (values - exact[0]).abs().max()
    assert orthogonality(own[1]) > 3 * orthogonality(vectors)
