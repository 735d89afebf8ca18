"""Products of models that lie in parts on several processes are those of one process that has all."""

from __future__ import annotations

import pytest

from tests.support.ranks import Failed
from tests.support.sharded_models import (
    SOME,
    TERMS,
    again_after_a_step,
    chosen,
    estimated,
    in_half,
    most_whole,
    products,
    traffic,
    trained,
    whole_vectors,
)

CASES = [
    ("data", "mlp", 2),
    ("data", "mlp", 3),
    ("data", "mlp", 4),
    ("data", "tied", 2),
    ("data", "tied, checkpoints", 3),
    ("parameters", "mlp", 3),
    ("parameters", "mlp", 4),
    ("parameters", "tied", 2),
    ("parameters", "tied, checkpoints", 3),
    ("parameters", "encoder", 2),
    ("tensor", "mlp", 2),
    ("tensor", "mlp", 3),
    ("tensor", "tied", 4),
    ("tensor", "tied, checkpoints", 2),
    ("both", "mlp", 4),
    ("both", "tied", 4),
]


ALL = {("data", "mlp", 3), ("parameters", "mlp", 4), ("tensor", "mlp", 2), ("both", "mlp", 4)}
"""Cases with every term; the others have one of each kind."""


@pytest.mark.parametrize(("kind", "model", "size"), CASES)
def test_products(ranks, kind, model, size):
    results = ranks.run(size, products, kind, model, TERMS if (kind, model, size) in ALL else SOME)
    assert not [r for r in results if isinstance(r, Failed)], results
    wrong = {name: max(r[name] for r in results) for name in results[0] if max(r[name] for r in results) > 1e-10}
    assert not wrong


@pytest.mark.parametrize(("kind", "model"), [("data", "mlp"), ("data", "tied"), ("parameters", "mlp")])
def test_training_goes_on_as_before(ranks, kind, model):
    results = ranks.run(2, trained, kind, model)
    assert not [r for r in results if isinstance(r, Failed)], results
    for got, expected in results:
        assert got == expected  # to the bit


@pytest.mark.parametrize(
    ("kind", "model", "size"), [("data", "mlp", 3), ("parameters", "mlp", 2), ("tensor", "mlp", 3), ("both", "mlp", 4)]
)
def test_vectors_as_users_have_them(ranks, kind, model, size):
    """Dicts of DTensors go in and come out; whole vectors come together where they are asked for, to the bit."""
    results = ranks.run(size, whole_vectors, kind, model)
    assert not [r for r in results if isinstance(r, Failed)], results
    for found in results:
        assert found["vector"]
        assert found["columns"]
        assert found["error"] <= 1e-10
        assert all("v[problem.layout.places()]" in said or "is still to be taken" in said for said in found["refused"])
        assert len(found["refused"]) == (2 if kind == "parameters" else 3)


@pytest.mark.parametrize("kind", ["data", "parameters", "tensor"])
def test_a_step_makes_operators_stale(ranks, kind):
    results = ranks.run(2, again_after_a_step, kind, "mlp")
    assert not [r for r in results if isinstance(r, Failed)], results
    for raised, error in results:
        assert raised == "StaleError"
        assert error <= 1e-10


@pytest.mark.parametrize("kind", ["data", "parameters", "tensor"])
def test_weights_in_half_precision_have_vectors_and_sums_in_single(ranks, kind):
    """Rounding is that of the model alone: no more than twice that of one process."""
    results = ranks.run(2, in_half, kind)
    assert not [r for r in results if isinstance(r, Failed)], results
    for got, alone, dtype in results:
        assert dtype == "torch.float32"
        assert got <= 2 * alone <= 0.05


@pytest.mark.parametrize(("kind", "size"), [("data", 2), ("parameters", 3), ("tensor", 2)])
def test_solvers_and_estimators(ranks, kind, size):
    results = ranks.run(size, estimated, kind)
    assert not [r for r in results if isinstance(r, Failed)], results
    wrong = {name: max(r[name] for r in results) for name in results[0] if max(r[name] for r in results) > 1e-8}
    assert not wrong


def test_some_of_the_parameters(ranks):
    results = ranks.run(3, chosen, "parameters")
    assert not [r for r in results if isinstance(r, Failed)], results
    assert max(results) <= 1e-10


def test_exchanges_of_a_product(ranks):
    """Of U units: weights are gathered in the forward, in the first pass back but for the two that are still whole, and twice in
    the second pass back, where the vector is gathered as well; gradients are summed and cut in each pass back."""
    units, bytes_of_all = 6, 8 * 6 * (8 * 8 + 8)
    for gathers, scatters, gathered, scattered in ranks.run(2, traffic):
        assert scatters == 2 * units
        assert scattered == 2 * bytes_of_all
        assert gathers <= 5 * units
        assert gathered <= 5 * bytes_of_all


def test_two_units_are_whole_at_a_time(ranks):
    """Also in the passes back: graphs hold no whole weight."""
    for most, unit in ranks.run(2, most_whole):
        assert unit < most <= 2 * unit
