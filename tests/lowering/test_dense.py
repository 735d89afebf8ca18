"""Matrices that are written out by a shorter way are those that products give, column by column."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from curvalg import CurvalgError, Facts, Identity, Term, registry
from tests.support.agreement import close
from tests.support.zoo import ZOO

build = registry.build
TERMS = {
    "jacobian": lambda: build("jacobian"),
    "jacobian.T": lambda: build("jacobian").T,
    "ggn": lambda: build("ggn"),
    "covariance": lambda: build("covariance"),
    "centered": lambda: build("centered_covariance"),
    "sum": lambda: 2 * build("ggn") - build("covariance") / 3 + 0.5 * Identity,
}


@pytest.mark.parametrize("model", ZOO)
@pytest.mark.parametrize("term", TERMS)
def test_written_out_as_products_give_it(term, model, problem_of):
    try:
        op = TERMS[term]().lower(problem_of(model))
        products = op @ torch.eye(op.shape[1]).double()
    except CurvalgError as error:
        with pytest.raises(type(error)):
            TERMS[term]().lower(problem_of(model)).to_dense()
        return
    close(TERMS[term]().lower(problem_of(model)).to_dense(), products)


@dataclass(frozen=True)
class WrongColumns(Term):
    """The GGN, with columns that are a hundredth too long."""

    def facts(self, loss=None):
        return Facts(psd=True)

    def cotangent_dot(self, batch, tangent):
        return batch.loss_hvp(tangent)

    def factor(self, batch):
        return 1.01 * batch.row_factor()


def test_columns_that_are_wrong_are_not_believed(problem_of):
    expected = build("ggn").lower(problem_of("mlp")).to_dense()
    close(WrongColumns().lower(problem_of("mlp")).to_dense(), expected)
