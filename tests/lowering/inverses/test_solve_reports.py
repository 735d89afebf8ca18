"""What a direct solve says where rounding leaves more than the tolerance."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from curvalg import CurvalgWarning, FactsError, Identity, Problem, inverse, registry


@pytest.fixture(params=[torch.float64, torch.float32], ids=["double", "single"])
def problem(request):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).to(request.param)
    return Problem(model, nn.CrossEntropyLoss(), (torch.randn(20, 4).to(request.param), torch.randint(0, 3, (20,))))


def shifted(problem, by=0.0):
    """H − (λmax + by ‖H‖) I, which is singular for zero."""
    hessian = registry.build("hessian")
    values = torch.linalg.eigvalsh(hessian.lower(problem).to_dense())
    return hessian - (float(values[-1]) + by * float(values.abs().max())) * Identity


def test_a_singular_matrix_is_refused(problem):
    op = inverse(shifted(problem), solver="dense").lower(problem)
    with pytest.raises(FactsError, match=r"singular to working precision .* add damping"):
        op @ torch.randn(problem.size, dtype=problem.dtype)


@pytest.mark.parametrize("problem", [torch.float32], indirect=True, ids=["single"])
def test_a_nearly_singular_matrix_is_warned_of_once(problem):
    op = inverse(shifted(problem, by=3 * torch.finfo(torch.float32).eps), solver="dense").lower(problem)
    b = torch.randn(problem.size, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(CurvalgWarning, match="singular to working precision; increase the damping"):
        result = op.solve(b)
    relative = result.residual / b.norm(dim=0)
    assert result.ok and float(relative.max()) > 1e-2
    assert all(reason.startswith("converged: what is left is rounding") for reason in result.reason)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op.solve(b)


def test_an_ordinary_matrix_is_not(problem):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ones = torch.ones(problem.size, dtype=problem.dtype)
        result = inverse(shifted(problem, by=1.0), solver="dense").lower(problem).solve(ones)
    assert result.ok and set(result.reason) == {"converged"}


@pytest.mark.parametrize("name", ["ggn", "kfac"])
def test_the_report_of_a_product_is_of_the_operand_as_it_was(name, problem_of):
    problem = problem_of("mlp")
    op = inverse(registry.build(name) + 0.1 * Identity).lower(problem)
    b = torch.randn(problem.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = op @ b
    b.zero_()
    assert torch.allclose(op.last_solve.x.reshape(-1), expected)
