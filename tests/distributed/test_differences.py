"""Differences of gradients of several processes, with parameters whole or in parts, are those of one process."""

from __future__ import annotations

import pytest

from tests.support.agreement import agree
from tests.support.rank_quantities import differences, of_one_process
from tests.support.ranks import Failed
from tests.support.sharded_models import by_differences

CASES = [
    ("data", "mlp", 3),
    ("data", "tied, checkpoints", 2),
    ("parameters", "mlp", 3),
    ("tensor", "mlp", 2),
    ("both", "tied", 4),
]


@pytest.mark.parametrize("size", [2, 3])
def test_whole_parameters(ranks, size):
    agree(ranks.run(size, differences), of_one_process("weighted", "hessian"), 1e-7)


@pytest.mark.parametrize(("kind", "model", "size"), CASES)
def test_parameters_in_parts(ranks, kind, model, size):
    results = ranks.run(size, by_differences, kind, model)
    assert not [r for r in results if isinstance(r, Failed)], results
    assert max(max(r) for r in results) <= 1e-7, results
