"""Terms are anybody's code: what they are given stays as it is, what they return fits, and messages say whose they are."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from curvalg import DatasetTerm, Diagonal, ExpressionError, MatrixTerm, Problem, Term, registry


@dataclass(frozen=True)
class WritesTangent(Term):
    def cotangent_dot(self, batch, tangent):
        return tangent.mul_(2)


@dataclass(frozen=True)
class WritesTarget(Term):
    def cotangent_dot(self, batch, tangent):
        batch.target.zero_()
        return tangent


@dataclass(frozen=True)
class WritesGradient(Term):
    def cotangent(self, batch):
        return batch.loss_gradient.mul_(2)


@dataclass(frozen=True)
class WritesOutput(DatasetTerm):
    def prepare(self, batch):
        batch.output.add_(1)
        return batch.output.sum()

    def project(self, vector, prepared):
        return vector.sum()

    def cotangent_dot(self, batch, tangent, prepared, totals):
        return tangent


@dataclass(frozen=True)
class WritesVector(DatasetTerm):
    def project(self, vector, prepared):
        return vector.mul_(2).sum()

    def cotangent_dot(self, batch, tangent, prepared, totals):
        return tangent * totals


@dataclass(frozen=True)
class WritesWeights(MatrixTerm):
    def accumulate(self, batch, prepared=None):
        batch.weights.mul_(2)
        return batch.vjp(batch.loss_gradient)

    def finish(self, stats, layout, prepared=None):
        return Diagonal(stats)


@dataclass(frozen=True)
class Single(Term):
    def cotangent_dot(self, batch, tangent):
        return tangent.float()


@dataclass(frozen=True)
class Meta(Term):
    def cotangent(self, batch):
        return batch.output.to("meta")


def problem(**options):
    torch.manual_seed(0)
    data = [(torch.randn(3, 4).double(), torch.tensor([0, 1, 2])) for _ in range(2)]
    return Problem(nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), data, **options)


@pytest.mark.parametrize("options", [{}, {"cache": 0}, {"columns": "loop"}], ids=str)
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize(
    "term", [WritesTangent, WritesTarget, WritesGradient, WritesOutput, WritesVector, WritesWeights]
)
def test_a_term_that_writes_into_what_it_is_given_is_refused(term, columns, options):
    p = problem(**options)
    labels = [y.clone() for _, y in p.data.source]
    op = (registry.build("ggn") + term()).lower(p)
    with pytest.raises(ExpressionError, match=r"module .*test_term_contract.*writes into a tensor that it was given"):
        op @ torch.ones(15, columns).double()
    if term is not WritesTarget:
        assert all(torch.equal(y, y_) for (_, y), y_ in zip(p.data.source, labels))


@pytest.mark.parametrize(
    ("term", "says"), [(Single, "torch.float64 on cpu.*got torch.float32"), (Meta, "on cpu.*on meta")]
)
def test_another_dtype_or_device_is_named(term, says):
    with pytest.raises(ExpressionError, match=says):
        term().lower(problem()) @ torch.ones(15).double()
