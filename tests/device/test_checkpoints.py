"""A checkpoint written on one device goes on on another, to the same numbers."""

from __future__ import annotations

import contextlib

import pytest
import torch

from curvalg import Identity, inverse, registry
from curvalg.estimate import diagonal, trace
from tests.support.devices import agree, both

HESSIAN = registry.build("hessian")


def solved(problem, **options):
    op = inverse(registry.build("ggn") + 0.1 * Identity, solver="cg").lower(problem)
    return op.solve(torch.ones(problem.size, dtype=torch.float64, device=problem.device), **options).x


RUNS = {
    "trace": lambda p, **options: trace(HESSIAN.lower(p), products=12, method="hutchinson", **options).value,
    "diagonal": lambda p, **options: diagonal(HESSIAN.lower(p), products=12, method="xdiag", **options).value,
    "a solve": solved,
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_run_is_resumed_elsewhere(name, first, tmp_path, inside):
    problems = dict(zip(("cpu", "cuda"), both("mlp"), strict=True))
    want = RUNS[name](problems["cpu"])
    path, saved, save = tmp_path / "run", [], inside["save_file"]

    def interrupted(*args, **kwargs):
        save(*args, **kwargs)
        saved.append(True)
        raise KeyboardInterrupt

    inside(save_file=interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        RUNS[name](problems[first], checkpoint=path)
    assert saved
    inside(save_file=save)
    second = "cpu" if first == "cuda" else "cuda"
    agree(want, RUNS[name](problems[second], checkpoint=path), 1e-7)
