"""What goes over single samples gives on several processes what it gives on one, in the order of the data.

Of three processes each problem is new; those of two go on from what other quantities have left.
"""

from __future__ import annotations

import pytest

from tests.support.agreement import agree
from tests.support.sample_quantities import (
    POSITIONS,
    POSTERIORS,
    PROJECTIONS,
    SAMPLES,
    TRAINING,
    VARIANCES,
    samples_of_one_process,
    samples_of_processes,
)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("split", ["training", "queries", "both"])
@pytest.mark.parametrize("quantity", SAMPLES)
def test_queries(ranks, size, split, quantity):
    got = ranks.run(size, samples_of_processes, "weighted", quantity, split, size == 2)
    agree(got, samples_of_one_process("weighted", quantity))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("quantity", TRAINING)
def test_training_samples(ranks, size, quantity):
    got = ranks.run(size, samples_of_processes, "weighted", quantity, "training", size == 2)
    agree(got, samples_of_one_process("weighted", quantity))


@pytest.mark.parametrize("split", ["training", "both"])
@pytest.mark.parametrize(
    "quantity",
    ["influence, ekfac", "influence, topk", "influence_stream", "influence on themselves", "self_influence, ekfac"],
)
def test_samples_that_are_positions(ranks, split, quantity):
    got = ranks.run(3, samples_of_processes, "positions", quantity, split)
    agree(got, samples_of_one_process("positions", quantity))


@pytest.mark.parametrize("quantity", POSITIONS)
def test_scores_of_positions(ranks, quantity):
    got = ranks.run(3, samples_of_processes, "tokens", quantity, "both")
    agree(got, samples_of_one_process("tokens", quantity))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("split", ["training", "queries", "both"])
@pytest.mark.parametrize("quantity", VARIANCES)
def test_variances_of_outputs(ranks, size, split, quantity):
    got = ranks.run(size, samples_of_processes, "weighted", quantity, split, size == 2)
    agree(got, samples_of_one_process("weighted", quantity))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("split", ["training", "queries", "both"])
@pytest.mark.parametrize("quantity", PROJECTIONS)
def test_projections_and_kernels(ranks, size, split, quantity):
    got = ranks.run(size, samples_of_processes, "weighted", quantity, split, size == 2)
    agree(got, samples_of_one_process("weighted", quantity))


@pytest.mark.parametrize("split", ["training", "both"])
@pytest.mark.parametrize("quantity", POSTERIORS)
def test_posteriors(ranks, split, quantity):
    got = ranks.run(3, samples_of_processes, "weighted", quantity, split)
    agree(got, samples_of_one_process("weighted", quantity))
