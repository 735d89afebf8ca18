"""Exact columns of many outputs are taken some at a time, and what they cost is said before they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Identity, MatrixTerm, Problem, inverse, registry
from curvalg.expr import Diagonal

WORDS, TOKENS, WIDTH = 40, 5, 6


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x))).movedim(-1, 1)


def problem(**options):
    torch.manual_seed(0)
    data = (torch.randn(4, TOKENS, 3).double(), torch.randint(0, WORDS, (4, TOKENS)))
    return Problem(Language().double(), nn.CrossEntropyLoss(), data, **options)


OUTPUTS = 4 * TOKENS * WORDS * 8
"""Bytes of the outputs of a batch."""


def test_columns_by_number_are_those_of_all():
    with problem().batches() as batches:
        (batch,) = batches
        every = batch.row_factor()
        assert len(every) == batch.loss_rank == TOKENS * (WORDS - 1)
        for start, stop in ((0, 7), (30, 50), (38, 40), (39, 117), (180, None), (0, None)):
            part = batch.row_factor(start=start, stop=stop)
            assert torch.allclose(part, every[start:stop], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rest", ["diagonal", "exact"])
@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_parts_give_the_same_matrix_and_no_more_columns_than_fit(name, rest, monkeypatch):
    from curvalg.problem.batch import Batch

    sizes = []
    right = Batch.layers

    def layers(self, columns):
        sizes.append(columns.numel() * columns.element_size())
        return right(self, columns)

    monkeypatch.setattr(Batch, "layers", layers)
    term = registry.build(name, rest=rest)
    whole = term.lower(problem(cache=2**30))
    v = torch.randn(whole.shape[1]).double()
    expected = whole @ v
    assert max(sizes) > 32 * OUTPUTS
    sizes.clear()
    limit = 4 * 20 * OUTPUTS
    found = term.lower(problem(cache=limit)) @ v
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)
    assert 0 < max(sizes) * 4 <= limit


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        (lambda b: b("kfac"), "kfac: exact columns of the loss, 195 for each row"),
        (lambda b: inverse(b("kfac") + Identity), "fisher='mc' takes 1, fisher='empirical' takes 1"),
        (lambda b: b("kfac", fisher="mc", samples=3), "draws, 3 for each row"),
        (lambda b: b("ekfac", fisher="empirical"), "a backward pass over a batch for each, in each of two passes"),
        (lambda b: b("ekfac", fisher="empirical"), "fisher='exact' takes 195"),
    ],
)
def test_the_cost_is_said_before_a_pass_is_made(expression, says):
    op = expression(registry.build).lower(problem())
    assert says in op.explain()
    op @ torch.ones(op.shape[1]).double()
    assert "still to be made" not in op.explain()


class Counts(MatrixTerm):
    """Anybody's matrix, which says what it costs."""

    name = "counts_of_a_test"

    def accumulate(self, batch, prepared=None):
        return torch.tensor(float(len(batch.output)))

    def finish(self, stats, layout, prepared=None):
        return Diagonal(stats * torch.ones(layout.size).double())

    def cost(self, batch):
        return f"counts: a call for every {len(batch.output)} rows"


def test_a_matrix_of_anybody_may_say_what_it_costs():
    op = Counts().lower(problem())
    assert "cost of what is still to be made\n  counts: a call for every 4 rows" in op.explain()
