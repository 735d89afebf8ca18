"""Matrices made of layers of models that lie in parts are those of one process that has all, block by block at the owners."""

from __future__ import annotations

import pytest

from tests.support.ranks import Failed
from tests.support.sharded_faults import is_known
from tests.support.sharded_layers import (
    algebra,
    along_the_last_axis,
    counted,
    faults,
    products,
    refused,
    solved,
    uneven,
)
from tests.support.sharded_models import most_whole

CASES = [
    ("data", "mlp", 2),
    ("data", "mlp", 3),
    ("parameters", "mlp", 3),
    ("parameters", "wide", 4),
    ("data", "tied", 3),
    ("parameters", "tied", 2),
    ("parameters", "tied, checkpoints", 3),
]
"""The last one of three processes has no data, and the first one fewer batches; of four one has no layer either."""


def right(results, allowed=1e-10):
    assert not [r for r in results if isinstance(r, Failed)], results
    wrong = {name: max(r[name] for r in results) for name in results[0] if not max(r[name] for r in results) <= allowed}
    assert not wrong


@pytest.mark.parametrize(("kind", "model", "size"), CASES)
def test_products_and_damped_inverses(ranks, kind, model, size):
    right(ranks.run(size, products, kind, model))


@pytest.mark.parametrize("one_by_one", [False, True])
def test_processes_whose_batches_take_other_passes(ranks, one_by_one):
    """Other numbers of batches, rows and columns, operations that only some batches have, columns that go back in turn."""
    right(ranks.run(3, uneven, one_by_one))


def test_weights_cut_along_their_columns(ranks):
    right(ranks.run(2, along_the_last_axis))


def test_sums_products_and_roots(ranks):
    right(ranks.run(3, algebra))


@pytest.mark.parametrize(("kind", "size"), [("data", 3), ("parameters", 2)])
def test_a_preconditioner_of_layers(ranks, kind, size):
    results = ranks.run(size, solved, kind)
    right([r if isinstance(r, Failed) else r["errors"] for r in results], 1e-10)
    for found in results:
        plain, helped = found["iterations"]
        assert helped < plain


@pytest.mark.parametrize("kind", ["data", "parameters"])
def test_each_process_has_the_factors_of_its_layers_alone(ranks, kind):
    results = ranks.run(3, counted, kind)
    assert not [r for r in results if isinstance(r, Failed)], results
    assert sum(found["owned"] for found in results) == results[0]["size"]
    for found in results:
        assert found["exchanges"] == (2, 0, 0)
        assert found["rows"] == found["owned"] < found["size"]
        assert "two exchanges a product" in found["explained"]
        assert "go to the owners of layers and back are not counted" in found["planned"]
        assert found["report"] is None  # it would be of the layers of one process


def test_a_rank_that_fails_while_a_matrix_is_made_is_an_error_on_all(ranks):
    """Also in the passes back through layers, and on the way of statistics to their owners; the next product is right."""
    results = ranks.run(3, faults, 8)
    assert not [r for r in results if isinstance(r, Failed)], results
    for each in zip(*results, strict=True):
        assert all(is_known(found) for found, _ in each) or all(found == "no error" for found, _ in each), each
        assert max(wrong for _, wrong in each) <= 1e-10
    assert any(found != "no error" for found, _ in results[0])


def test_two_units_are_whole_at_a_time(ranks):
    """Also while layers are recorded, and in the passes back through them."""
    for most, unit in ranks.run(2, most_whole, "kfac", False):
        assert unit < most <= 2 * unit


REFUSED = {
    "rows that move": ("ProblemError", "layer.weight do not see the rows of the batch in their order"),
    "a layer of two modules": ("ProblemError", "give a weight and its bias to one module"),
    "an unseen layer": ("ProblemError", "layer.weight, because it is used where no function of torch shows it"),
    "parallel": ("ExpressionError", "fully_shard alone"),
    "block_diagonal(kfac)": ("ExpressionError", "block-diagonal matrices are not offered"),
    "restrict(kfac, '0.*')": ("ExpressionError", "sub-matrices are not offered"),
    "ggn_class(stored=True)": ("ExpressionError", "not made layer by layer"),
    "sqrt(ggn + 0.1*identity)": ("ExpressionError", "square roots"),
    "diagonal_part(ggn)": ("ExpressionError", "diagonals found by products"),
    "nystrom(ggn, 3)": ("ExpressionError", "Nyström"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_offered_is_refused_by_name(ranks, name):
    kind, said = REFUSED[name]
    results = ranks.run(2, refused, name)
    assert not [r for r in results if isinstance(r, Failed)], results
    assert any(found == kind and said in text for found, text in results), results
    assert all(found in (kind, "GroupError") for found, _ in results), results
