"""Every solver and every estimator on the device, with the numbers of the CPU; and what a kept product leaves undone."""

from __future__ import annotations

import pytest
import torch

from curvalg import estimate, registry
from curvalg.expr import SOLVERS
from tests.support.device_tables import ESTIMATES, SOLVES, estimated, estimated_on_the_cpu, solve, solved_on_the_cpu
from tests.support.devices import SIMULATED, agree, both

if SIMULATED:
    from tests.support import simulated_gpu

RESULTS = {name for name in estimate.__all__ if name[0].isupper()}
TERMS = [name for name in registry.names() if name != "empirical_fisher"]


def ones(op):
    return torch.ones(op.shape[1], dtype=torch.float64, device=op.device)


def test_the_tables_are_complete():
    assert list(SOLVES) == list(SOLVERS)
    named = {name.split(",")[0].replace("spectral norm", "norm") for name in ESTIMATES}
    assert set(estimate.__all__) - RESULTS <= named


@pytest.mark.parametrize("name", SOLVES)
def test_solvers(name):
    agree(solved_on_the_cpu(name), solve(name, both(SOLVES[name][0])[1]))


@pytest.mark.parametrize("name", ESTIMATES)
def test_estimators(name):
    wanted, device = estimated_on_the_cpu(name), both("mlp")[1]
    host, before = torch.get_rng_state(), torch.cuda.get_rng_state()
    for want, got in zip(wanted, estimated(name, device), strict=True):
        agree(want, got, 1e-9 if SIMULATED else 1e-6)  # Krylov spaces magnify the rounding of another machine
    assert torch.equal(torch.get_rng_state(), host)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("autocast", [torch.bfloat16])
def test_autocast(autocast):
    cpu, device = both("mlp", autocast=autocast)
    for term in ("ggn", "hessian", "covariance"):
        want, got = (op @ ones(op) for op in (registry.build(term).lower(p) for p in (cpu, device)))
        agree(want, got, 5e-2)


def test_the_caller_is_under_autocast():
    cpu, device = both("mlp")
    want = [op @ ones(op) for op in (registry.build(term).lower(cpu) for term in ("ggn", "kfac"))]
    with torch.autocast("cuda", torch.float16):
        got = [op @ ones(op) for op in (registry.build(term).lower(device) for term in ("ggn", "kfac"))]
    for pair in zip(want, got, strict=True):
        agree(*pair)


@pytest.mark.skipif(not SIMULATED, reason="only the simulated GPU counts uploads")
@pytest.mark.parametrize("term", TERMS)
def test_a_kept_product_uploads_nothing(term):
    _, device = both("mlp", verify=False)  # the first product is not looked at
    op = registry.build(term).lower(device)
    x = ones(op)
    for _ in range(4):  # until all is chosen and kept
        op @ x
    with simulated_gpu.watch("curvalg", "curvalg_plugins") as seen:
        op @ x
    assert not [(name, place) for kind, name, place in seen if kind.startswith("upload")]
