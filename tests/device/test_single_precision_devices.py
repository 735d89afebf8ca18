"""A device without float64, as Apple's: what needs it moves to the CPU, and the numbers are those of float32 on the CPU."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

from curvalg import CurvalgError, Problem, registry
from curvalg.tensors.memory import widest
from tests.support.device_tables import ESTIMATES, SOLVES, solve
from tests.support.devices import SIMULATED, agree, moved
from tests.support.zoo import make

if SIMULATED:
    from tests.support import simulated_gpu

pytestmark = pytest.mark.skipif(not SIMULATED, reason="only a simulated GPU can be without float64")


@pytest.fixture(autouse=True)
def _without_double(monkeypatch):
    if SIMULATED:
        monkeypatch.setattr(simulated_gpu.options, "float64", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tolerances below the rounding of float32
        yield


def single(t):
    return t.float() if t.is_floating_point() else t


def both(name, **options):
    """The problem of a case in float32 on the CPU, and the same on the device."""
    case = make(name)
    model, batches = case.model.float(), [tuple(single(t) for t in batch) for batch in case.batches]
    return (
        Problem(model, case.loss, batches, **options),
        Problem(copy.deepcopy(model).cuda(), case.loss, moved(batches), **options),
    )


def compare(name, compute, **options):
    cpu, device = both(name, **options)
    wanted = compute(cpu)
    with simulated_gpu.watch("curvalg") as seen:
        found = compute(device)
    assert not [place for kind, _, place in seen if kind == "float64"]
    for want, got in zip(*(x if isinstance(x, list) else [x] for x in (wanted, found)), strict=True):
        want, got = (
            torch.as_tensor(x, device="cpu").double() for x in (want, got.cpu() if hasattr(got, "cpu") else got)
        )
        agree(want, got, 1e-4)


@pytest.mark.parametrize("term", [name for name in registry.names() if name != "empirical_fisher"])
def test_terms(term):
    def products(problem):
        op = registry.build(term).lower(problem)
        x = torch.linspace(-1, 1, op.shape[1], dtype=torch.float32, device=problem.device)
        return [op @ x, op @ torch.stack([x, x + 1], 1)]

    compare("mlp", products)


@pytest.mark.parametrize("solver", SOLVES)
def test_solvers(solver):
    compare(SOLVES[solver][0], lambda problem: solve(solver, problem))


ORTHONORMAL = ("trace", "trace, xtrace", "trace, hutch++", "diagonal", "diagonal, xdiag", "svds")
"""Estimators that make rows orthonormal, whose norms ``curvalg.solve.orthogonal`` takes in float64 on the device."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, raises=TypeError) if name in ORTHONORMAL else ())
        for name in ESTIMATES
    ],
)
def test_estimators(name):
    compare("mlp", ESTIMATES[name])


def test_what_is_less_exact_is_said():
    cpu, device = both("mlp")
    assert "cuda:0 has no float64" in registry.build("ggn").lower(device).explain()
    assert "no float64" not in registry.build("ggn").lower(cpu).explain()


def test_sums_in_double_precision_are_refused_by_name():
    with pytest.raises(CurvalgError, match="this device has no float64"):
        both("mlp", accumulate=torch.float64)


@pytest.mark.parametrize(("kind", "double"), [("mps", False), ("xpu", False), ("xpu", True), ("cuda", True)])
def test_the_widest_float_of_other_kinds_of_devices(kind, double, monkeypatch):
    properties = SimpleNamespace(has_fp64=double)
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: SimpleNamespace(get_device_properties=lambda d: properties)
    )
    assert widest(torch.device(kind, 0)) == (torch.float64 if double else torch.float32)
