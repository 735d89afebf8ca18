"""Pictures show what they are of."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch

from curvalg import ExpressionError, Identity, Problem, ProblemError, inverse, registry
from curvalg.estimate import heat_map

mpl.use("Agg")


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    return Problem(net, torch.nn.MSELoss(), (torch.randn(9, 3).double(), torch.randn(9, 2).double()))


def test_a_heat_map_shows_the_entries(problem):
    op = registry.build("hessian").lower(problem)
    axes = heat_map(op)
    expected = op.to_dense().abs().log10().numpy()
    shown = axes.images[0].get_array()
    seen = expected > expected.max() - 6
    assert np.allclose(shown[seen], expected[seen]) and np.isclose(shown.min(), max(expected.min(), expected.max() - 6))
    assert len(axes.lines) == 6  # three lines each way


def test_a_heat_map_of_a_rectangular_operator_and_of_zero(problem):
    axes = heat_map(registry.build("jacobian").lower(problem))
    assert axes.get_ylabel() == "outputs" and axes.images[0].get_array().shape == (18, 26)
    heat_map((registry.build("ggn") - registry.build("ggn")).lower(problem))


def test_large_matrices_are_not_drawn():
    net = torch.nn.Linear(100, 50)
    op = registry.build("ggn").lower(Problem(net, torch.nn.MSELoss(), (torch.ones(2, 100), torch.ones(2, 50))))
    with pytest.raises(ProblemError, match=r"at most 4096 rows to draw, but ggn is 5050 x 5050; restrict"):
        heat_map(op)


@pytest.mark.parametrize("solver", ["cg", "minres"])
def test_the_history_of_a_solve(problem, solver):
    op = inverse(registry.build("ggn") + 0.1 * Identity, solver=solver, rtol=1e-9).lower(problem)
    b = torch.randn(problem.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b[:, 1] = 0
    result = op.solve(b)
    history = result.history
    assert history.shape == (int(result.iterations.max()) + 1, 2)
    assert torch.allclose(history[0], b.norm(dim=0))
    assert float(history[-1, 0]) <= 1e-9 * float(b[:, 0].norm()) and (history[:, 1] == 0).all()
    lines = result.plot().lines
    assert [len(line.get_xdata()) for line in lines] == [int(n) + 1 for n in result.iterations]


def test_a_direct_solve_has_no_history(problem):
    result = inverse(registry.build("ggn") + 0.1 * Identity, solver="dense").lower(problem).solve(problem.gradient())
    assert result.history is None
    with pytest.raises(ValueError, match="direct: there is no residual history"):
        result.plot()


def test_what_is_no_operator_is_not_drawn():
    with pytest.raises(ExpressionError, match="expected a CurvatureOperator, got Hessian"):
        heat_map(registry.build("hessian"))
