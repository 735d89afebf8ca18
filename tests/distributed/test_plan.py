"""Plans say what processes then count, call by call and byte by byte."""

from __future__ import annotations

import pytest

from tests.support.planned import held, in_parts, with_whole_parameters

IN_PARTS = [
    ("data", "mlp", 2),
    ("data", "mlp", 4),
    ("data", "tied", 2),
    ("parameters", "mlp", 2),
    ("parameters", "mlp", 4),
    ("parameters", "tied", 2),
    ("parameters", "tied, checkpoints", 4),
    ("parameters", "encoder", 2),
]


@pytest.mark.parametrize(("kind", "model", "size"), IN_PARTS)
def test_parameters_in_parts(ranks, kind: str, model: str, size: int) -> None:
    texts = ["hessian", "ggn", "hessian + centered_covariance", "ggn_class", "2*hessian + ggn"]
    for found in ranks.run(size, in_parts, kind, model, texts):
        for text, (counted, planned) in found.items():
            assert planned == counted, text


def test_several_columns_in_parts(ranks) -> None:
    for found in ranks.run(2, in_parts, "parameters", "mlp", ["hessian", "ggn"], 4):
        for text, (counted, planned) in found.items():
            assert planned == counted, text


@pytest.mark.parametrize(("model", "size", "columns"), [("mlp", 2, 1), ("mlp", 4, 1), ("tied", 2, 1), ("mlp", 2, 3)])
def test_whole_parameters_on_each(ranks, model: str, size: int, columns: int) -> None:
    texts = ["hessian", "ggn", "2*hessian + ggn - 3*covariance + 0.001*identity", "hessian + centered_covariance"]
    texts += ["block_diagonal(hessian)", "hessian @ ggn", "kfac"]
    for found in ranks.run(size, with_whole_parameters, model, texts if model == "mlp" else texts[:2], columns):
        for text, (counted, planned) in found.items():
            assert planned == counted, text


def test_the_memory_of_weights(ranks) -> None:
    """The first process has the most."""
    found = ranks.run(4, held)
    assert max(own for own, _ in found) == found[0][1]
    assert len({planned for _, planned in found}) == 1
