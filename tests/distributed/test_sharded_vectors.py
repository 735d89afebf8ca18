"""Vectors that are cut over processes: the same numbers as of whole ones, by the same products."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.support.ranks import Failed
from tests.support.sharded_vectors import CASES, Results, Whole, difference, on_ranks, size_of


@cache
def whole(name: str) -> Results:
    return CASES[name](Whole(size_of(name)))


@pytest.mark.parametrize(("cut", "world"), [("uneven", 3), ("interleaved", 2), ("replicated", 3)])
@pytest.mark.parametrize("name", CASES)
def test_vectors_may_be_cut_in_any_way(ranks: Any, name: str, cut: str, world: int) -> None:
    results = ranks.run(world, on_ranks, cut, name)
    assert not (failed := [r for r in results if isinstance(r, Failed)]), failed
    assert len({r["exchanges"] for r in results}) == 1
    for found in results:
        assert not (wrong := difference(found, whole(name))), wrong
