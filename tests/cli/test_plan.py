"""``curvalg plan``: the plan of the operator, as a table and as JSON, and clear refusals."""

from __future__ import annotations

import json

import pytest

from curvalg import parse


def test_json_is_the_plan_of_the_operator(run, tiny, tiny_problem) -> None:
    options = ("--ranks", 4, "--device-memory", "80GiB", "--steps", 7, "--flops", 1e12, "--bandwidth", 1e10)
    result = run("plan", "hessian", "--problem", tiny, *options, "--json")
    assert result.exit_code == 0, result.stderr
    op = parse("hessian").lower(tiny_problem)
    plan = op.plan(4, 80 * 2**30, steps=7, flops=1e12, bandwidth=1e10)
    assert json.loads(result.stdout) == json.loads(plan.as_json())
    assert plan.fits and plan.memory.basis == 7 * 27 * 8


def test_a_table_for_people(run, tiny) -> None:
    shown = run("plan", "ggn", "-p", tiny, "--ranks", 2, "--device-memory", "1kB", "--shard", "data").stdout
    for word in ("snapshot", "does not fit", "all-reduce", "unknown without flops=", "cure:"):
        assert word in shown


@pytest.mark.parametrize("memory", ["80 parsecs", "-3GB", "0"])
def test_a_memory_that_is_none(run, tiny, memory: str) -> None:
    result = run("plan", "ggn", "-p", tiny, f"--device-memory={memory}")
    assert result.exit_code == 2
    assert "80GB" in result.stderr and memory in result.stderr
