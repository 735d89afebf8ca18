"""Models, losses and calls of users' own, in parts on several processes: the numbers are those of plain torch on one."""

from __future__ import annotations

import pytest

from tests.support.ranks import Failed
from tests.support.sharded_ways import (
    a_function_as_loss,
    after_a_mistake,
    after_forwards,
    bilinear,
    by_another_method,
    recurrent,
    terms_of_others,
    written,
)


def right(results, allowed=1e-10):
    assert not [r for r in results if isinstance(r, Failed)], results
    assert all(error <= allowed for found in results for error in found.values()), results


@pytest.mark.parametrize("size", [2, 3])
def test_recurrent_layers(ranks, size):
    right(ranks.run(size, recurrent))


def test_a_method_beside_forward(ranks):
    right(ranks.run(2, by_another_method))


def test_forwards_that_leave_weights_whole(ranks):
    """They lie in parts again for the product, and the backward of the forward before it is right."""
    right(ranks.run(2, after_forwards))


@pytest.mark.parametrize(("size", "empty"), [(2, False), (3, True)])
def test_a_function_as_loss(ranks, size, empty):
    right(ranks.run(size, a_function_as_loss, empty))


@pytest.mark.parametrize(("kind", "size"), [("data", 3), ("tensor", 2), ("both", 4)])
def test_bilinear_forms_are_of_whole_vectors(ranks, kind, size):
    results = ranks.run(size, bilinear, kind)
    assert not [r for r in results if isinstance(r, Failed)], results
    assert max(results) <= 1e-10


@pytest.mark.parametrize("mistake", ["vector", "model"])
def test_a_mistake_on_one_process_leaves_the_others_in_step(ranks, mistake):
    for raised, error in ranks.run(2, after_a_mistake, mistake):
        assert raised in ("VectorError", "StaleError", "GroupError")
        assert error <= 1e-10


def test_a_file_is_there_for_all_once_it_is_written(ranks, tmp_path):
    results = ranks.run(4, written, str(tmp_path / "trace.safetensors"))
    assert results == [0.0] * 4


@pytest.mark.parametrize(("kind", "size"), [("data", 2), ("parameters", 3)])
def test_terms_of_others_do_not_see_batches_that_count_for_nothing(ranks, kind, size):
    right(ranks.run(size, terms_of_others, kind))
