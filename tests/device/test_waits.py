"""How often the host waits for the device: a table, by the count of the simulated GPU. Each wait idles a real one."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from torch import nn

from curvalg import Expr, Identity, Problem, inverse, registry
from curvalg.estimate import eigsh, spectral_density
from tests.support.devices import SIMULATED, moved

if SIMULATED:
    from tests.support import simulated_gpu

pytestmark = pytest.mark.skipif(not SIMULATED, reason="only the simulated GPU counts waits")
BUILD = registry.build
WARM = 20
"""Products until all ways are chosen and everything is kept."""
MODELS = {
    "MLP": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)),
    "CNN": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    ),
}
FEATURES = {"MLP": 6, "CNN": 36}
TERMS = {name: BUILD(name) for name in ("hessian", "ggn", "covariance")} | {"kfac": BUILD("kfac", rest="diagonal")}


def problem_of(model: str, **options: object) -> Problem:
    """A problem of two batches that lie on the device, the model in eval mode."""
    torch.manual_seed(0)
    net = MODELS[model]().cuda().eval()
    X, y = torch.randn(20, FEATURES[model]), torch.randint(0, 3, (20,))
    # Without checks of the first products, whose waits are not counted.
    return Problem(net, nn.CrossEntropyLoss(), moved([(X[:12], y[:12]), (X[12:], y[12:])]), verify=False, **options)


def columns(problem: Problem, *count: int) -> torch.Tensor:
    return torch.linspace(-1, 2, problem.size * (*count, 1)[0], device="cpu").sin().reshape(problem.size, *count).cuda()


def kinds(compute) -> Counter:
    """What was noted, by kind; a wait is a "sync" or a "synchronize"."""
    with simulated_gpu.watch("curvalg") as seen:
        compute()
    found = Counter()
    for (kind, _, _), count in seen.items():
        found["waits" if kind in ("sync", "synchronize") else kind] += count
    return found


def of_a_product(expr: Expr, problem: Problem, *count: int, warm: int = WARM) -> tuple[int, int]:
    """(waits, blocking uploads) of one product, once many were made."""
    op, x = expr.lower(problem), columns(problem, *count)
    for _ in range(warm):
        op @ x
    found = kinds(lambda: op @ x)
    return found["waits"], found["upload"]


@pytest.mark.parametrize("count", [(), (3,)], ids=["1 column", "3 columns"])
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("model", MODELS)
def test_a_kept_product_waits_once(model, term, count):
    assert of_a_product(TERMS[term], problem_of(model), *count) == (1, 0)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("model", MODELS)
def test_a_fresh_product_of_data_on_the_device_waits_once(model, term):
    assert of_a_product(TERMS[term], problem_of(model, cache=0), warm=4) == (1, 0)


@pytest.mark.parametrize(("term", "solver"), [("kfac", "auto"), ("ggn", "gram"), ("ggn", "dense")])
def test_a_product_with_a_factored_inverse_waits_once(term, solver):
    matrix = inverse(BUILD(term) + 0.1 * Identity, solver=solver)
    assert of_a_product(matrix, problem_of("MLP")) == (1, 0)


@pytest.mark.parametrize("solver", ["cg", "minres"])
def test_an_iteration_waits_once(solver):
    problem, found = problem_of("MLP"), {}
    matrix, v = BUILD("ggn") + 1e-3 * Identity, columns(problem)
    for steps in (
        30,
        30,
        40,
    ):  # at first all is chosen and kept; no step from 30 to 40 is one at which MINRES is audited
        op = inverse(matrix, solver=solver, maxiter=steps, rtol=1e-14, on_fail="warn").lower(problem)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that so few iterations are not enough
            made = []
            found[steps] = kinds(lambda op=op, made=made: made.append(op.solve(v).iterations))
        assert made[0] == steps
    assert found[40]["waits"] - found[30]["waits"] == 10
    assert found[40]["upload"] == found[30]["upload"]


@pytest.fixture(scope="module")
def hessian():
    """The Hessian of a model of several hundred parameters, whose products have been made before."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 60), nn.Tanh(), nn.Linear(60, 3)).cuda()
    X, y = torch.randn(20, 6), torch.randint(0, 3, (20,))
    problem = Problem(net, nn.CrossEntropyLoss(), moved([(X[:12], y[:12]), (X[12:], y[12:])]))
    op = BUILD("hessian").lower(problem)
    for _ in range(WARM):
        op @ columns(problem)
        op @ columns(problem, 3)
    return op


def test_a_step_of_the_eigensolver_waits_twice(hessian, inside):
    inside(small_eigenproblem=lambda *_: None)
    made, spent = [], []
    for pairs in (1, 3):
        spent.append(kinds(lambda k=pairs: made.append(eigsh(hessian, k, block=1).products)))
    assert made[1] - made[0] >= 10
    assert spent[1]["waits"] - spent[0]["waits"] <= 2.1 * (made[1] - made[0])


@pytest.mark.parametrize("probes", [1, 3])
def test_a_step_of_the_density_waits_twice(probes, hessian):
    few, many = (kinds(lambda n=n: spectral_density(hessian, probes=probes, steps=n)) for n in (5, 15))
    assert many["waits"] - few["waits"] <= 2.1 * 10
