"""A device without float64, as Apple's: what needs it moves to the CPU, and the numbers are those of float32 on the CPU."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

from curvalg import CurvalgError, Identity, Problem, estimate, registry
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


LARGE = (
    *("eigsh, both ends", "spectral_density, outliers", "logdet", "matrix_function", "trace", "trace, hutch++"),
    *("trace, xnystrace", "diagonal"),
)
"""Estimators that are compared on a larger problem, where they come by random vectors and Krylov spaces."""


@pytest.mark.parametrize("name", [name for name in ESTIMATES if name not in LARGE])
def test_estimators(name):
    compare("mlp", ESTIMATES[name])


def wider(device):
    """A problem of 683 parameters and 540 columns of factors, so that neither a matrix nor its Gram matrix is cheap, on a device."""
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(270, 6, generator=generator), torch.randint(0, 3, (270,), generator=generator)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 68), torch.nn.Tanh(), torch.nn.Linear(68, 3)).to(device)
    return Problem(net, torch.nn.CrossEntropyLoss(), moved([(X[:150], y[:150]), (X[150:], y[150:])], device))


def krylov(problem):
    """Estimates by Krylov spaces and random vectors, each of which makes products with rows of hundreds of numbers."""
    hessian, damped = registry.build("hessian").lower(problem), (registry.build("ggn") + 0.1 * Identity).lower(problem)
    return {
        "eigsh, both ends": estimate.eigsh(hessian, 4, which="BE", block=2, tol=1e-3),
        "spectral_density, outliers": estimate.spectral_density(hessian, probes=2, steps=8, outliers=2),
        "logdet": estimate.logdet(damped, products=20),
        "matrix_function": estimate.matrix_function(damped, "sqrt", torch.ones(problem.size, 2, device=problem.device)),
        "trace": estimate.trace(hessian, products=24),
        "trace, hutch++": estimate.trace(hessian, products=24, method="hutch++"),
        "trace, xnystrace": estimate.trace(damped, products=24, method="xnystrace"),
        "diagonal": estimate.diagonal(hessian, products=24),
    }


def test_krylov_spaces_and_random_vectors(inside):
    inside(small_eigenproblem=lambda *_: None)
    wanted = krylov(wider("cpu"))
    with simulated_gpu.watch("curvalg") as seen:
        found = krylov(wider("cuda"))
    assert not [place for kind, _, place in seen if kind == "float64"]
    assert tuple(wanted) == LARGE
    for name, want in wanted.items():
        got = found[name]
        assert got.products > 0 and got.method == want.method != "exact", name
        for part in ("eigenvalues", "density", "value", "values"):
            if hasattr(want, part):
                agree(*(torch.as_tensor(getattr(x, part)).cpu().double() for x in (want, got)), 1e-3)


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
