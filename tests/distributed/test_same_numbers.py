"""Quantities of several processes are those of one, on uneven parts, with ranks that have no data."""

from __future__ import annotations

import pytest

from tests.support.agreement import agree
from tests.support.rank_quantities import (
    OF_CLASSES,
    QUANTITIES,
    decompositions,
    exchanges,
    in_parts,
    of_one_process,
    of_processes,
)
from tests.support.ranks import Failed

LIKELIHOOD = ("fisher", "fisher_mc(samples=2)", *OF_CLASSES)
FEWER = {
    "callable": {"fisher", "fisher_mc(samples=2)", *OF_CLASSES},
    "squares": set(OF_CLASSES),
}
"""Quantities that a loss does not have."""


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_weighted_classes_and_ignored_targets(ranks, size, quantity):
    """Of three processes each problem is new; those of two and of four go on from what other quantities have left."""
    agree(ranks.run(size, of_processes, "weighted", quantity, size != 3), of_one_process("weighted", quantity))


SOME = [
    "value",
    "gradient",
    "hessian",
    "covariance",
    "centered_covariance",
    "ggn_mc(samples=3, seed=4)",
    "kfac",
    "ekfac",
    "ggn_diagonal",
    "inverse(ggn + c) by cg",
    "inverse(kfac + c)",
    "ggn, many products",
    "estimated trace",
    "form gradient",
    "gradient norms",
    "eigsh",
]


@pytest.mark.parametrize("setup", ["positions", "chunked", "callable", "squares"])
@pytest.mark.parametrize("quantity", SOME)
def test_other_samples_outputs_and_losses(ranks, setup, quantity):
    agree(ranks.run(3, of_processes, setup, quantity), of_one_process(setup, quantity))


@pytest.mark.parametrize("options", [{"cache": 0}, {"factored": True}, {"columns": "loop"}, {"verify": False}], ids=str)
@pytest.mark.parametrize(
    "quantity", ["hessian", "ggn", "covariance", "kfac", "inverse(ggn + c)", "block_diagonal(ggn)"]
)
def test_options(ranks, options, quantity):
    got = ranks.run(3, of_processes, "weighted", quantity, False, options)
    agree(got, of_one_process("weighted", quantity, **options))


@pytest.mark.parametrize(
    ("text", "headers", "payloads"),
    [
        ("hessian", 1, 1),
        ("ggn", 1, 1),
        ("2*hessian + ggn - 3*covariance + 0.001*identity", 1, 1),
        ("hessian + centered_covariance", 1, 1),
        ("ggn_class", 2, 1),
        ("kfac", 0, 0),
        ("ekfac", 0, 0),
        ("inverse(kfac + 0.01*identity)", 0, 0),
        ("jacobian", 1, 1),
        ("ntk", 2, 2),
        ("block_diagonal(hessian)", 1, 1),
    ],
)
def test_exchanges_of_a_product(ranks, text, headers, payloads):
    """Totals of a few numbers ride with the header."""
    for found in ranks.run(2, exchanges, text):
        assert found[:2] == (headers, payloads), found


@pytest.mark.parametrize("text", ["ekfac", "inverse(kfac + 0.01*identity)"])
def test_eigendecompositions_are_dealt_out(ranks, text):
    """Two layers of two factors each: no process decomposes more than two, and each is decomposed once."""
    results = ranks.run(3, decompositions, text)
    assert not [r for r in results if isinstance(r, Failed)], results
    assert sum(own for own, _ in results) == results[0][1] == 4
    assert max(own for own, _ in results) == 2


def test_many_columns_travel_in_parts(ranks):
    for error, payloads in ranks.run(3, in_parts):
        assert error <= 1e-10
        assert payloads == 2
