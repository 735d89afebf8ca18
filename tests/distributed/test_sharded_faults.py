"""Mistakes and faults with models that lie in parts are errors on all ranks, which name the cure; the group goes on."""

from __future__ import annotations

import pytest

from tests.support.ranks import Failed
from tests.support.sharded_faults import TRAPS, faults, is_known, trapped


@pytest.mark.parametrize("name", TRAPS)
def test_all_ranks_are_told(ranks, name):
    results = ranks.run(2, trapped, name)
    for found, error in results:
        assert isinstance(found, Failed), f"{name}: {found}"
        assert "CurvalgError" in found.kind, found.trace
        assert error <= 1e-10
    assert any(TRAPS[name][1] in found.message for found, _ in results), [found.message for found, _ in results]


@pytest.mark.parametrize(("kind", "size"), [("data", 2), ("parameters", 3)])
def test_a_rank_that_fails_in_the_middle_of_a_product_is_an_error_on_all(ranks, kind, size):
    """Also between the exchanges of weights, in the forward and on the ways back; the next product is right."""
    results = ranks.run(size, faults, kind, 12)
    assert not [r for r in results if isinstance(r, Failed)], results
    for each in zip(*results, strict=True):
        assert all(is_known(found) for found, _ in each) or all(found == "no error" for found, _ in each), each
        assert max(error for _, error in each) <= 1e-10
