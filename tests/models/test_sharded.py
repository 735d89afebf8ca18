"""A model of a library that lies in parts on several processes has the products of one process."""

from __future__ import annotations

import pytest

from tests.support.models.sharded_llama import errors_of_products
from tests.support.ranks import Failed, Ranks

pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


@pytest.mark.parametrize(("kind", "size"), [("data", 3), ("parameters", 2), ("tensor", 2), ("both", 4)])
def test_a_llama_with_grouped_queries(ranks, kind, size):
    results = ranks.run(size, errors_of_products, kind)
    assert not [r for r in results if isinstance(r, Failed)], results
    wrong = {name: max(r[name] for r in results) for name in results[0] if max(r[name] for r in results) > 1e-10}
    assert not wrong
