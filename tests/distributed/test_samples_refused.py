"""Single samples of several processes: what cannot be right is an error on all of them, and all go on after it."""

from __future__ import annotations

import pytest

from tests.support.ranks import Failed
from tests.support.sample_faults import (
    ASKING,
    CHANGES,
    asked_differently,
    fails_on_one,
    other_lengths,
    other_processes,
    resumed,
)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("quantity", ASKING)
def test_other_queries_on_one_process(ranks, quantity, how):
    for found in ranks.run(3, asked_differently, quantity, how):
        assert isinstance(found, Failed), found
        assert "GroupError" in found.kind, found
        assert "have different" in found.message, found


@pytest.mark.parametrize("split", ["training", "both"])
@pytest.mark.parametrize("quantity", ["influence", "self_influence", "functional_variance"])
def test_a_failure_of_one_process(ranks, quantity, split):
    *others, own = ranks.run(2, fails_on_one, quantity, split)
    assert "out of luck" in own.message, own
    assert "GroupError" not in own.kind, own
    for found in others:
        assert "GroupError" in found.kind, found
        assert "rank 1 of 2 failed: ProblemError: the model failed on batch" in found.message, found


@pytest.mark.parametrize("split", ["training", "queries", "both"])
def test_resuming(ranks, tmp_path, split):
    results = ranks.run(3, resumed, str(tmp_path), split)
    assert not [r for r in results if isinstance(r, Failed)], results
    assert max(results) <= 1e-10


def test_other_numbers_of_positions(ranks):
    for found in ranks.run(2, other_lengths):
        assert isinstance(found, Failed), found
        assert "ProblemError" in found.kind, found
        assert "different numbers of positions" in found.message, found


def test_other_processes(ranks):
    for found in ranks.run(4, other_processes):
        assert isinstance(found, list), found
        assert len(found) == 3, found
        assert all("process" in failure.message and "group=" in failure.message for failure in found), found
