"""Inverses of matrices that have none: refused by every question, however the matrix is held and whatever rounding left of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import FactsError, Identity, Problem, inverse, registry
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
