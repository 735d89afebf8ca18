"""Exact quantities that would be wrong are refused: of factors that products contradict, and of singular matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from curvalg import ExpressionError, Facts, FactsError, Identity, Problem, Term, inverse, registry, sqrt


@dataclass(frozen=True)
class Squares(Term):
    """JᵀJ, with columns that are too large by a factor."""

    factor_scale: float

    def facts(self, loss=None):
        return Facts(psd=True)

    def cotangent_dot(self, batch, tangent):
        return tangent

    def factor(self, batch):
        n, classes = batch.output.shape
        return self.factor_scale * torch.eye(classes).to(batch.output)[:, None, :].expand(classes, n, classes)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    return Problem(model, nn.CrossEntropyLoss(), (torch.randn(9, 4).double(), torch.randint(0, 3, (9,))))


@pytest.mark.parametrize("quantity", ["eigh", "trace", "diagonal"])
def test_a_factor_that_products_contradict(quantity, problem):
    right = Squares(1.0).lower(problem)
    assert abs(right.exact("trace") - float(right.to_dense().trace())) < 1e-9
    with pytest.raises(ExpressionError, match=r"squares .*columns of factor do not make the matrix"):
        Squares(2.0).lower(problem).exact(quantity)
    with pytest.raises(ExpressionError, match="columns of factor"):
        sqrt(Squares(2.0) + Identity).lower(problem) @ torch.ones(problem.size).double()
    with pytest.raises(ExpressionError, match="columns of factor"):
        inverse(Squares(2.0) + Identity).lower(problem) @ torch.ones(problem.size).double()


@pytest.mark.parametrize("name", ["hessian", "residual"])
def test_the_logarithm_of_rounding_errors(name, problem):
    term = registry.build(name)
    with pytest.raises(FactsError, match="zero to working precision"):
        term.lower(problem).exact("logdet")
    damped = (term + 10 * Identity).lower(problem)
    assert math.isclose(damped.exact("logdet"), float(torch.linalg.slogdet(damped.to_dense()).logabsdet), rel_tol=1e-10)
