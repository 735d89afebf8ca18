"""Plans of numbers alone: figures of a paper's size, laws of memory and time, and refusals."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from curvalg.errors import OptionError
from curvalg.planning import PassWork, StageWork, UnitSizes, Workload, plan_run


def dense(parameters: int = 10**9, units: int = 50, **options) -> Workload:
    layers = tuple(UnitSizes(((parameters // units, 1),)) for _ in range(units))
    return Workload.of_dense(layers, **{"rows": 10**7, "batch_rows": 100, **options})


def test_a_billion_parameters_on_a_thousand_ranks() -> None:
    """By hand, with float32 vectors of 4e9 bytes, 1e7 samples of one position, 2e14 FLOP/s a rank and links of 25e9 bytes/s: a
    gradient is 6 D N = 6e16 FLOPs; a fresh Hessian product takes three of them, a fresh GGN product two, from kept graphs two."""
    ranks, rate, link = 1000, 2e14, 25e9
    options = {"ranks": ranks, "steps": 100, "flops": rate, "bandwidth": link, "latency": 0.0}
    for forwards, gradients in ((9, 3), (6, 2), (4, 4 / 3)):
        plan = plan_run(dense(forwards=forwards), shard="data", **options)
        assert plan.flops * ranks == pytest.approx(gradients * 6e16)
        assert plan.compute == pytest.approx(gradients * 6e16 / ranks / rate)
    whole = plan_run(dense(), shard="data", device_memory=80e9, **options)
    assert whole.traffic["all-reduce"].moved / link == pytest.approx(0.32, rel=2e-3)  # a ring: 2 · 4e9 bytes
    assert whole.memory.basis == 400e9
    assert whole.fits is False and "ranks with parts" in str(whole.cure)
    parts = plan_run(dense(), shard="parameters", device_memory=80e9, **options)
    assert parts.memory.basis == 100 * 4e9 / ranks  # 0.4 GB
    assert parts.fits is True
    # At most five gathers and two reduce-scatters of D for each of the 100 batches of a rank: 7 · 0.16 s a batch.
    moved = parts.traffic["gather"].moved + parts.traffic["reduce-scatter"].moved
    assert moved / link == pytest.approx(100 * 7 * 4e9 / link, rel=2e-3)
    # Σⱼ 2 passes · 4 j D/R FLOPs for j ≤ 100.
    assert parts.orthogonalisation == pytest.approx(8 * 5050 * 1e6)


def test_a_language_model_has_many_positions() -> None:
    one, many = (plan_run(dense(positions=n), ranks=1000, shard="data") for n in (1, 1000))
    assert many.flops == pytest.approx(1000 * one.flops)


@pytest.mark.parametrize("units", [1, 7, 50])
def test_more_ranks_never_need_more(units: int) -> None:
    work = dense(10**6, units)
    totals = [plan_run(work, ranks=r, shard="parameters").memory for r in (2, 3, 8, 64, 1000)]
    for more, less in zip(totals, totals[1:], strict=False):
        assert less.parameters <= more.parameters and less.basis <= more.basis and less.vectors <= more.vectors
    assert all(m.whole_units == min(2, units) * 4 * (10**6 // units) for m in totals)


def test_the_smallest_number_of_ranks_that_fits() -> None:
    work, have = dense(10**6, 20), 2e7
    cure = plan_run(work, ranks=2, shard="parameters", device_memory=have).cure
    least = int(str(cure).split()[0])
    assert plan_run(work, ranks=least, shard="parameters", device_memory=have).fits
    assert not plan_run(work, ranks=least - 1, shard="parameters", device_memory=have).fits


def test_where_no_number_of_ranks_fits_it_says_what_is_too_large() -> None:
    plan = plan_run(dense(10**6, 1, nbytes=10**9), ranks=2, shard="parameters", device_memory=1e7)
    assert "no number of ranks" in str(plan.cure) and "smaller batches" in str(plan.cure)


def test_parameters_are_cut_where_they_do_not_fit() -> None:
    assert plan_run(dense(), ranks=1000, device_memory="80GB").shard == "parameters"
    assert plan_run(dense(10**6), ranks=1000, device_memory="80GB").shard == "data"
    assert plan_run(dense(), ranks=1000).shard == "data"


def test_more_ranks_than_numbers() -> None:
    """Each process has a slice at most, and buffers are padded to one for each."""
    work = Workload.of_dense((UnitSizes(((3, 4),)),), rows=5, batch_rows=5)
    plan = plan_run(work, ranks=8, shard="parameters")
    assert plan.memory.parameters == 4 * 4
    assert plan.traffic["gather"].bytes == 5 * 8 * 4 * 4


def test_one_rank_exchanges_nothing() -> None:
    plan = plan_run(dense(), flops=1e12)
    assert plan.traffic == {} and plan.exchange == 0 and plan.seconds == plan.compute


def test_times_are_unknown_without_rates() -> None:
    plan = plan_run(dense(), ranks=2)
    assert plan.compute is None and plan.exchange is None and plan.seconds is None and plan.run_seconds is None
    assert "unknown without flops=" in str(plan) and plan.fits is None


def test_the_time_of_a_run_has_all_in_it() -> None:
    plan = plan_run(dense(), ranks=8, shard="parameters", steps=10, flops=1e14, bandwidth=1e10, latency=1e-3)
    traffic = plan.traffic.values()
    assert plan.exchange == pytest.approx(sum(t.moved for t in traffic) / 1e10 + 1e-3 * sum(t.calls for t in traffic))
    assert plan.run_seconds == pytest.approx(10 * (plan.compute + plan.exchange) + plan.orthogonalisation / 1e14)


def test_recordings_are_kept_where_they_fit_the_budget() -> None:
    record, column = StageWork(3.0), StageWork(6.0)
    one = PassWork(record, column, column, nbytes=100)
    units = (UnitSizes(((10, 1),)),)
    # 8 batches of 100 bytes on 2 ranks: four a rank.
    kept = plan_run(Workload(units, 80, 10, (one,), budget=400.0), ranks=2, shard="data")
    fresh = plan_run(Workload(units, 80, 10, (one,), budget=399.0), ranks=2, shard="data")
    assert (kept.memory.recordings, kept.flops) == (400, 4 * 6.0)
    assert (fresh.memory.recordings, fresh.flops) == (100, 4 * 9.0)


def test_columns() -> None:
    one = PassWork(StageWork(3.0), StageWork(6.0), StageWork(5.0), nbytes=100)
    work = Workload((UnitSizes(((100, 1),)),), 10, 10, (one,))
    plan = plan_run(work, ranks=2, columns=4, shard="data")
    assert plan.flops == 3 + 6 + 3 * 5
    assert plan.traffic["all-reduce"].bytes == 4 * 100 * 4


def test_the_total_is_the_sum() -> None:
    memory = plan_run(dense(), ranks=64, shard="parameters").memory
    assert memory.total == sum(asdict(memory).values())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"ranks": 0}, "ranks="),
        ({"ranks": -2}, "ranks="),
        ({"ranks": "4"}, "ranks="),
        ({"ranks": True}, "ranks="),
        ({"steps": 0}, "steps="),
        ({"columns": 1.5}, "columns="),
        ({"device_memory": "much"}, "80GB"),
        ({"device_memory": math.inf}, "80GB"),
        ({"device_memory": 0}, "80GB"),
        ({"flops": -1.0}, "flops="),
        ({"bandwidth": "fast"}, "bandwidth="),
        ({"latency": -1.0}, "latency="),
        ({"shard": "model"}, "'parameters'"),
    ],
)
def test_what_is_refused(options: dict, word: str) -> None:
    with pytest.raises(OptionError, match=word):
        plan_run(dense(10**6), **options)


def test_gathers_that_nobody_counted() -> None:
    one = PassWork(StageWork(1.0), StageWork(1.0), StageWork(1.0))
    with pytest.raises(OptionError, match="counts of gathers"):
        plan_run(Workload((UnitSizes(((10, 1),)),), 1, 1, (one,)), ranks=2, shard="parameters")


def test_a_workload_without_data() -> None:
    with pytest.raises(OptionError, match="rows="):
        dense(rows=0)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("80e9", 80e9), ("80GB", 80e9), ("80 GiB", 80 * 2**30), ("1.5tib", 1.5 * 2**40), (7, 7), ("512", 512)],
)
def test_units_of_memory(text: object, nbytes: float) -> None:
    assert plan_run(dense(10**6), device_memory=text).device_memory == nbytes
