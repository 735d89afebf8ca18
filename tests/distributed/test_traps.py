"""What users get wrong with several processes is an error on all of them, which names the cure; the group goes on."""

from __future__ import annotations

import pytest

from tests.support.rank_faults import TRAPS, trapped, two_groups
from tests.support.ranks import Failed


@pytest.mark.parametrize("name", TRAPS)
def test_all_ranks_are_told(ranks, name):
    results = ranks.run(2, trapped, name)
    for found, error in results:
        assert isinstance(found, Failed), f"{name}: {found}"
        assert "CurvalgError" in found.kind, found.trace
        assert error <= 1e-10
    assert any(TRAPS[name][1] in found.message for found, _ in results), [found.message for found, _ in results]


def test_other_process_groups_of_the_same_ranks(ranks):
    """Nobody waits for the timeout."""
    for found, error in ranks.run(4, two_groups, patience=20.0):
        assert isinstance(found, Failed), found
        assert "GroupError" in found.kind, found.trace
        assert "passed different process groups" in found.message
        assert error <= 1e-10
