"""Passes over the data: where their order counts, and what is no data."""

from __future__ import annotations

import numpy as np
import pytest

from curvalg.errors import ProblemError
from curvalg.problem.data import Data
from tests.support.small_rows import CPU, X, Y, batches


class Passes:
    """Another list of batches in every pass."""

    def __init__(self, *passes):
        self.passes = iter(passes)

    def __iter__(self):
        return iter(next(self.passes))


def read(data, **options):
    return list(data.read(CPU, **options))


def test_order_counts_only_where_it_matters():
    flipped = batches([1, 0, 2, 3, 4, 5], 6)
    data = Data(Passes(batches(range(6), 6), flipped, flipped, batches(range(6), 6)), None, True)
    read(data), read(data)
    with pytest.raises(ProblemError, match=r"order.*shuffle=False.*list\(loader\)"):
        read(data, order_matters=True)
    read(data, order_matters=True)


def test_other_samples_are_seen_without_an_order():
    data = Data(Passes(batches(range(6), 3), [(X, Y.roll(1))]), None, True)
    read(data)
    with pytest.raises(ProblemError, match="differ from the first pass"):
        read(data)


def test_a_second_pass_without_samples_is_told_from_empty_data():
    data = Data(Passes(batches(range(6), 3), [], []), None, True)
    read(data)
    with pytest.raises(ProblemError, match=r"only once.*list\(data\).*starts anew"):
        read(data)
    for empty in ([], Passes([])):
        with pytest.raises(ProblemError, match="empty"):
            read(Data(empty, None, True))


def test_arrays_are_to_be_converted():
    pair = X.numpy(), Y.numpy()
    for batch in (pair, {"x": pair[0], "y": pair[1]}):
        with pytest.raises(ProblemError, match=r"torch\.from_numpy"):
            read(Data(batch, None, True))
    assert isinstance(pair[0], np.ndarray)


def test_a_tuple_of_batches_is_to_be_a_list():
    with pytest.raises(ProblemError, match=r"one batch; a list of batches is written \[\.\.\.\]"):
        read(Data(tuple(batches(range(6), 2)), None, True))
    with pytest.raises(ProblemError, match="cannot find the target") as caught:
        read(Data((X, X, Y), None, True))
    assert "written" not in str(caught.value)
