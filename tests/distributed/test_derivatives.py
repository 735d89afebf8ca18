"""Gradients of curvature on several processes are those of one, by all that model and loss depend on."""

from __future__ import annotations

import pytest

from tests.support.agreement import agree
from tests.support.rank_derivatives import (
    NUMBERS,
    different,
    differentiated,
    differentiated_by_one,
    explained,
    tempered,
)
from tests.support.ranks import Failed


def agree_all(results, expected):
    """A number and each of its gradients."""
    assert not [r for r in results if isinstance(r, Failed)], results
    for number, one in enumerate(expected):
        agree([several[number] for several in results], one, 1e-8)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_and_gradients_by_parameters_class_weights_and_damping(ranks, size, name):
    agree_all(ranks.run(size, differentiated, name), differentiated_by_one(name))


@pytest.mark.parametrize("name", ["quadratic_form", "trace", "logdet"])
def test_gradients_by_parameters_that_are_not_chosen(ranks, name):
    agree_all(ranks.run(3, differentiated, name, "2.*"), differentiated_by_one(name, "2.*"))


def test_a_tensor_that_all_ranks_find_gets_its_gradient(ranks):
    for error, afterwards in ranks.run(2, tempered):
        assert not isinstance(error, Failed), error
        assert error <= 1e-10
        assert afterwards <= 1e-10


@pytest.mark.parametrize(
    ("size", "function", "said"),
    [(3, tempered, "give every rank a batch"), (2, different, "different losses of the same rows")],
)
def test_tensors_that_not_all_ranks_have_are_refused_on_all(ranks, size, function, said):
    for found, error in ranks.run(size, function):
        assert isinstance(found, Failed), found
        assert "GroupError" in found.kind, found.trace
        assert said in found.message
        assert error <= 1e-10


def test_a_rank_without_data_explains_what_it_knows(ranks):
    results = ranks.run(3, explained)
    assert not [r for r in results if isinstance(r, Failed)], results
    assert ["which has no data" in text for text in results] == [False, False, True]
    assert all("cost of what is still to be made" in text for text in results)
