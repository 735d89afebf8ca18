"""Inverses of matrices that have none: refused by every question, however the matrix is held and whatever rounding left of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Diagonal, FactsError, Identity, Kronecker, Problem, inverse, registry
from curvalg.estimate import diagonal, eigsh, logdet, trace


def problem(dtype, rows):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).to(dtype)
    data = torch.randn(rows, 6, dtype=dtype), torch.randint(4, (rows,))
    return Problem(net, nn.CrossEntropyLoss(), data)


QUESTIONS = {
    "product": lambda op: op @ torch.ones(op.shape[0], dtype=op.problem.dtype),
    "dense": lambda op: op.to_dense(),
    "diagonal": diagonal,
    "trace": trace,
    "logdet": logdet,
    "eigsh": lambda op: eigsh(op, 2),
}
MATRICES = {
    # Adding the same number to all logits changes nothing, so that no ggn has an inverse.
    "dense": ("ggn", 40, {"solver": "dense"}),
    "one factor": ("kfac", 40, {}),
    "both factors": ("kfac", 5, {}),
    "eigenbasis": ("ekfac", 5, {}),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("name", MATRICES)
def test_every_question_is_refused(name, dtype, question):
    term, rows, options = MATRICES[name]
    op = inverse(registry.build(term), **options).lower(problem(dtype, rows))
    with pytest.raises(FactsError, match="add damping"):
        QUESTIONS[question](op)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("name", MATRICES)
def test_damped_it_has_one(name, dtype):
    term, rows, options = MATRICES[name]
    given = problem(dtype, rows)
    damped = registry.build(term) + 1e-3 * Identity
    found = inverse(damped, **options).lower(given).to_dense().double()
    # Of its own numbers, which in single precision are rounded to 1e-7 of the largest.
    wanted = torch.linalg.inv(damped.lower(given).to_dense().double())
    assert float((found - wanted).norm()) <= (1e-2 if dtype == torch.float32 else 1e-9) * float(wanted.norm())


def saturating(seed, dtype, reduction, size, rows):
    """Inputs of some size; the output factor of the last layer has no inverse, and rounding gives it one or the other sign."""
    torch.manual_seed(seed)
    classes = 3 + seed % 4
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, classes))
    data = size * torch.randn(rows, 4), torch.randint(0, classes, (rows,))
    return Problem(net.to(dtype), nn.CrossEntropyLoss(reduction=reduction), (data[0].to(dtype), data[1]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("term", ["kfac", "ekfac"])
@pytest.mark.parametrize("size", [1, 30])
def test_rounding_gives_no_factor_an_inverse(term, reduction, size):
    for seed in range(8):
        op = inverse(registry.build(term)).lower(saturating(seed, torch.float32, reduction, size, 60))
        with pytest.raises(FactsError, match="add damping"):
            op @ torch.ones(op.shape[0])


@pytest.mark.parametrize("damping", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("term", ["kfac", "ekfac"])
def test_small_dampings_in_single_precision(term, damping):
    """Of a sum over many rows, whose eigenvalues of rounding are larger than the damping."""
    expr = inverse(registry.build(term) + damping * Identity)
    single, double = (expr.lower(saturating(0, dtype, "sum", 1, 2000)) for dtype in (torch.float32, torch.float64))
    b = torch.randn(single.shape[0], generator=torch.Generator().manual_seed(1))
    wanted = double @ b.double()
    assert float((single @ b - wanted).norm()) <= 1e-4 * float(wanted.norm())


@pytest.mark.parametrize("decades", [15, 17, 30])
def test_a_division_is_exact_over_all_decades(decades):
    given = Problem(nn.Linear(8, 8, bias=False), nn.MSELoss(), (torch.randn(9, 8), torch.randn(9, 8)))
    values = torch.logspace(0, -decades, 64)
    assert torch.allclose(inverse(Diagonal(values)).lower(given) @ values, torch.ones(64))
    factor = torch.logspace(0, -decades / 2, 8)
    product = inverse(Kronecker(factor.diag(), factor.diag())).lower(given)
    assert torch.allclose(product @ torch.outer(factor, factor).reshape(-1), torch.ones(64))
    with pytest.raises(FactsError, match="for 1 of its eigenvalues"):
        inverse(Diagonal(torch.cat([torch.zeros(1), values[1:]]))).lower(given) @ values
