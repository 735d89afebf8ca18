"""Estimators know no scale: a matrix times any power of two gives the same digits times what that power makes of the result."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from curvalg import Diagonal, Problem, ProblemError, registry
from curvalg.estimate import (
    diagonal,
    effective_dimension,
    eigsh,
    logdet,
    matrix_function,
    norm,
    spectral_density,
    svds,
    trace,
)
from curvalg.runs import Outgrown, State
from curvalg.runs import run as run_of
from tests.support.spectra import matrix

N = 70
DTYPES = {torch.float32: 60, torch.float64: 500}
SCALES = [(dtype, sign * power) for dtype, power in DTYPES.items() for sign in (-1, 1)]


def definite(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return matrix(
        torch.rand(N, generator=generator, dtype=torch.float64) + torch.logspace(0, -3, N).double(), dtype, seed
    )


def indefinite(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return matrix(
        torch.randn(N, generator=generator, dtype=torch.float64) * torch.logspace(1, -3, N).double(), dtype, seed
    )


def rectangular(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(N, 30, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 30).double()).to(dtype)


def of_kind(A: torch.Tensor, kind: str):
    return {"tensor": lambda: A, "array": A.numpy, "operator": lambda: aslinearoperator(A.numpy())}[kind]()


def estimates(made) -> list[torch.Tensor]:
    return [torch.as_tensor(x, dtype=torch.float64) for x in (made.value, made.error)]


def pairs(made) -> list[torch.Tensor]:
    return [made.eigenvalues, made.residuals]


LINEAR = {
    "eigsh": (indefinite, lambda A: pairs(eigsh(A, 4, block=2))),
    "eigsh, both ends": (indefinite, lambda A: pairs(eigsh(A, 4, which="BE", block=1, tol=1e-5))),
    "eigsh, deflated": (
        indefinite,
        lambda A: pairs(eigsh(A, 3, block=1, deflate=torch.eye(N, 2, dtype=torch.float64))),
    ),
    "svds": (rectangular, lambda A: [(made := svds(A, 3, block=1)).values, made.residuals]),
    "svds of a wide one": (lambda *a: rectangular(*a).T, lambda A: [svds(A, 3, block=1).values]),
    "spectral norm": (rectangular, lambda A: estimates(norm(A, "spectral", tol=1e-3))[:1]),
    "diagonal, hutchinson": (indefinite, lambda A: estimates(diagonal(A, products=20, method="hutchinson"))),
    "diagonal, xdiag": (indefinite, lambda A: estimates(diagonal(A, products=40))),
    "diagonal, exact": (indefinite, lambda A: estimates(diagonal(A, products=N))),
    "diagonal to a tolerance": (definite, lambda A: estimates(diagonal(A, products=8, tol=0.05, method="xdiag"))),
    **{
        f"trace, {method}": (definite, lambda A, m=method: estimates(trace(A, products=40, method=m)))
        for method in ("hutchinson", "hutch++", "xtrace", "xnystrace")
    },
    "trace, exact": (definite, lambda A: estimates(trace(A, products=N, method="exact"))),
    "trace to a tolerance": (definite, lambda A: estimates(trace(A, products=8, tol=0.02, method="hutchinson"))),
    "Frobenius, xnystrace": (rectangular, lambda A: estimates(norm(A, products=20, method="xnystrace"))),
    "Frobenius, hutchinson": (rectangular, lambda A: estimates(norm(A, products=20, method="hutchinson"))),
    "Frobenius, exact": (rectangular, lambda A: estimates(norm(A, products=60))),
    "Frobenius to a tolerance": (rectangular, lambda A: estimates(norm(A, products=8, tol=0.01, method="hutchinson"))),
    "Frobenius, no transpose": (rectangular, lambda A: estimates(norm(forgetful(A), products=20))),
    "density": (indefinite, lambda A: [(d := spectral_density(A, probes=3, steps=12)).grid, d.nodes]),
    "density's floor": (
        definite,
        lambda A: [(d := spectral_density(A, probes=3, scale="log")).grid, torch.tensor(d.floor, dtype=torch.float64)],
    ),
    "a root squared": (definite, lambda A: [root(A).square()]),
}
"""Estimators of homogeneous quantities, name -> (matrix, the numbers that it scales)."""
GRIDS = ("density", "density's floor")
"""Those whose points are rounded."""


def forgetful(A) -> LinearOperator:
    return LinearOperator(A.shape, matvec=lambda x: A.numpy() @ x, dtype=A.numpy().dtype)


def root(A) -> torch.Tensor:
    return torch.as_tensor(matrix_function(A, "sqrt", torch.ones(N, dtype=torch.float64)).value).double()


@pytest.mark.parametrize(("dtype", "power"), SCALES)
@pytest.mark.parametrize("name", LINEAR)
def test_results_scale_with_the_matrix(name, dtype, power):
    make, measure = LINEAR[name]
    A = make(dtype)
    expected = measure(A)
    assert bool(expected[0].any())
    for wanted, found in zip(expected, measure(A * 2.0**power), strict=True):
        assert bool(torch.isfinite(found).all())
        if name in GRIDS:
            assert torch.allclose(found, wanted * 2.0**power, rtol=1e-9, atol=0)
            continue
        # Powers of two are exact: not a bit may differ.
        assert torch.equal(found, wanted * 2.0**power)


@pytest.mark.parametrize("kind", ["array", "operator"])
@pytest.mark.parametrize(("dtype", "power"), SCALES)
def test_matrices_of_all_kinds(kind, dtype, power):
    A = indefinite(dtype)
    small, large = (eigsh(of_kind(X, kind), 3, block=1) for X in (A, A * 2.0**power))
    assert torch.equal(small.eigenvalues * 2.0**power, large.eigenvalues)
    assert torch.equal(small.eigenvectors, large.eigenvectors) and small.products == large.products
    assert (
        trace(of_kind(A, kind), products=20).value * 2.0**power
        == trace(of_kind(A * 2.0**power, kind), products=20).value
    )


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**20), st.floats(-19, 19), st.sampled_from(sorted(LINEAR)))
def test_any_factor_has_the_error_of_scale_one(seed, decade, name):
    make, measure = LINEAR[name]
    if any(word in name for word in ("tolerance", "residuals", "density")):
        return
    A, factor = make(torch.float32, seed), 10.0**decade
    wanted, found = measure(A)[0], measure((A.double() * factor).float())[0] / factor
    assert (found - wanted).norm() <= 2e-3 * wanted.norm()


@pytest.mark.parametrize(("dtype", "power"), SCALES)
def test_log_determinants_gain_n_times_the_logarithm(dtype, power):
    A = definite(dtype)
    plain, far = logdet(A, products=100), logdet(A * 2.0**power, products=100)
    gain = N * power * math.log(2)
    assert far.value == pytest.approx(plain.value + gain, abs=1e-12 * abs(gain))
    assert far.error == pytest.approx(plain.error, abs=1e-12 * abs(gain))


@pytest.mark.parametrize(("dtype", "power"), SCALES)
def test_effective_dimensions_depend_on_the_ratio(dtype, power):
    A = definite(dtype)
    plain, far = (
        effective_dimension(A, 0.1, products=100),
        effective_dimension(A * 2.0**power, 0.1 * 2.0**power, products=100),
    )
    assert far.value == plain.value and far.error == plain.error


@pytest.mark.parametrize(("dtype", "power"), SCALES)
def test_densities_keep_their_shape(dtype, power):
    A, factor = indefinite(dtype), 2.0**power
    plain, far = (spectral_density(X, probes=3, steps=12, outliers=1) for X in (A, A * factor))
    for name in ("density", "lower", "upper"):
        assert torch.allclose(getattr(far, name) * factor, getattr(plain, name), rtol=1e-9)
    assert float(torch.trapezoid(far.density, far.grid)) == pytest.approx(1.0, abs=1e-3)
    asked = torch.linspace(-2, 2, 50, dtype=torch.float64)
    plain = spectral_density(A, probes=3, steps=12, grid=asked, width=0.1)
    far = spectral_density(A * factor, probes=3, steps=12, grid=asked * factor, width=0.1 * factor)
    assert torch.allclose(far.density * factor, plain.density, rtol=1e-9)
    assert far.count(0, factor).value == plain.count(0, 1).value and far.cdf(0.5 * factor) == plain.cdf(0.5)
    logarithmic = [spectral_density(X, probes=3, steps=12, scale="log").density for X in (A, A * factor)]
    assert torch.allclose(*logarithmic, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("dtype", "power"), SCALES)
def test_functions_are_taken_of_true_eigenvalues(dtype, power):
    A, factor, v = definite(dtype), 2.0**power, torch.ones(N, dtype=dtype)
    plain = matrix_function(A, lambda x: x / (x + 0.3), v)
    far = matrix_function(A * factor, lambda x: x / (x + 0.3 * factor), v)
    assert torch.equal(plain.value, far.value) and plain.steps == far.steps
    vectors = matrix_function(A, "sqrt", v * factor)
    assert torch.equal(vectors.value, matrix_function(A, "sqrt", v).value * factor)
    squares = matrix_function(A * factor, torch.square, v / factor)
    assert torch.allclose(squares.value, matrix_function(A, torch.square, v).value * factor, rtol=1e-3)


def test_a_product_beyond_the_range_is_refused():
    A, v = definite(torch.float32) * 2.0**100, torch.ones(N)
    with pytest.raises(ProblemError, match=r"beyond the range of float32.*float64"):
        matrix_function(A, torch.square, v)


@pytest.mark.parametrize(
    "measure",
    [
        lambda A: trace(A, products=16),
        lambda A: norm(A, products=16),
        lambda A: norm(A, "spectral"),
        lambda A: svds(A, 1).values,
        lambda A: eigsh(A, 1),
    ],
)
def test_a_value_beyond_the_range_is_refused(measure):
    with pytest.raises(ProblemError, match=r"finite products|beyond the range of float64; divide the operator"):
        measure(torch.full((16, 16), 2e307, dtype=torch.float64))


def test_outliers_are_of_the_scale_of_the_rest():
    A = indefinite(torch.float64)
    plain, far = (spectral_density(X, probes=3, steps=12, outliers=2) for X in (A, A * 2.0**-500))
    assert torch.allclose(far.outliers * 2.0**500, plain.outliers, rtol=1e-3)
    assert torch.allclose(far.nodes * 2.0**500, plain.nodes, rtol=0.05, atol=1e-2)


def test_zero_matrices_are_of_no_scale():
    zero = torch.zeros(N, N)
    assert not eigsh(zero, 2).eigenvalues.any() and trace(zero, products=20).value == 0
    assert norm(zero, products=20).value == 0 and not svds(zero, 2).values.any()
    assert not matrix_function(zero, "sqrt", torch.ones(N)).value.any()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_products_that_are_not_finite_are_refused(scale):
    A = indefinite(torch.float32) * scale
    A[3, 5] = A[5, 3] = torch.nan
    for measure in (eigsh, trace, diagonal, norm, spectral_density):
        with pytest.raises(ProblemError, match="finite products"):
            measure(A)


@pytest.mark.parametrize("start", [0, N - 1])
@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, 35), (torch.float64, 300)])
def test_a_start_that_misses_the_scale_changes_no_result(start, dtype, power):
    """The first product is of an eigenvector of another scale than all others have."""
    spectrum = torch.ones(N, dtype=dtype)
    spectrum[start] = 2.0**-power
    spectrum[1:-1] += torch.rand(N - 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    A, v = torch.diag(spectrum) * 2.0**power, torch.eye(N, dtype=dtype)[:, start]
    found = eigsh(A, 3, v0=v, block=1)
    assert torch.allclose(found.eigenvalues, spectrum.double().sort().values[-3:] * 2.0**power, rtol=1e-3)
    assert norm(A, products=N, method="exact").value == pytest.approx(float(spectrum.double().norm()) * 2.0**power)


def test_a_run_starts_anew_where_its_unit_was_too_small(tmp_path, inside):
    """No random vector is multiplied before the first one, since a diagonal is known to be symmetric."""
    inside(small_eigenproblem=lambda *_: None)
    net = torch.nn.Linear(10, 7, bias=False)
    problem = Problem(net, torch.nn.MSELoss(), (torch.randn(4, 10), torch.randn(4, 7)))
    values = 2.0**60 * torch.linspace(1, 2, N)
    values[0] = 2.0**10
    op, v0, path = Diagonal(values).lower(problem), torch.eye(N)[:, 0], tmp_path / "run.safetensors"
    found = eigsh(op, 3, v0=v0, block=1, tol=1e-4, checkpoint=path)
    assert torch.allclose(found.eigenvalues, values[-3:].double(), rtol=1e-3)
    again = eigsh(op, 3, v0=v0, block=1, tol=1e-4, checkpoint=path)
    assert torch.equal(again.eigenvalues, found.eigenvalues) and again.products == found.products
    plain = eigsh(op, 3, v0=torch.ones(N), block=1, tol=1e-4)
    assert found.products > plain.products - 10 and torch.allclose(plain.eigenvalues, found.eigenvalues, rtol=1e-3)


def test_an_interrupted_new_start_is_an_interruption():
    class Restarted:
        name, options, starts = "restarted", {}, 0

        def start(self):
            self.starts += 1
            if self.starts == 2:
                raise KeyboardInterrupt
            return State({}, {"products": 0})

        def step(self, state):
            raise Outgrown("larger")

        def done(self, state):
            return False

        def expected(self, state):
            return 1

    with pytest.raises(KeyboardInterrupt):
        run_of(Restarted())


@pytest.mark.parametrize("power", [-60, 60])
@pytest.mark.parametrize("name", ["ggn", "hessian", "jacobian"])
def test_curvature_operators(name, power, inside):
    inside(small_eigenproblem=lambda *_: None)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    problem = Problem(net, torch.nn.CrossEntropyLoss(), (torch.randn(20, 5), torch.randint(0, 3, (20,))))
    op, far = (expr.lower(problem) for expr in (registry.build(name), 2.0**power * registry.build(name)))
    for measure in [lambda A: svds(A, 2, block=1).values[1:], lambda A: torch.tensor(norm(A, products=20).value)]:
        assert torch.allclose(measure(far), measure(op) * 2.0**power, rtol=1e-3)
    if name == "jacobian":
        return
    plain, scaled = (eigsh(A, 2, which="LA", block=1) for A in (op, far))
    assert torch.allclose(scaled.eigenvalues, plain.eigenvalues * 2.0**power, rtol=1e-3)
    for measure in (trace, diagonal):
        values = [torch.as_tensor(measure(A, products=30).value) for A in (op, far)]
        assert torch.allclose(values[1], values[0] * 2.0**power, rtol=1e-2, atol=1e-3 * 2.0**power)
    deviations = [spectral_density(A, probes=2, steps=10, outliers=1).nodes for A in (op, far)]
    assert torch.allclose(deviations[1], deviations[0] * 2.0**power, rtol=1e-2, atol=1e-3 * 2.0**power)


def resumable(A: torch.Tensor, calls: list[int], at: int) -> LinearOperator:
    def product(x):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return A.numpy() @ x

    return LinearOperator(
        A.shape, matvec=product, matmat=product, rmatmat=lambda x: A.numpy().T @ x, dtype=A.numpy().dtype
    )


RUNS = {
    "eigsh": lambda op, path: eigsh(op, 3, block=1, tol=1e-5, checkpoint=path).eigenvectors,
    "svds": lambda op, path: svds(op, 3, block=1, tol=1e-5, checkpoint=path).values,
    "trace": lambda op, path: torch.tensor(
        trace(op, products=8, tol=0.02, maxiter=100_000, method="hutchinson", checkpoint=path).value
    ),
    "density": lambda op, path: spectral_density(op, probes=3, steps=30, checkpoint=path).density,
    "function": lambda op, path: matrix_function(op, torch.abs, torch.ones(N), steps=30, checkpoint=path).value,
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("power", [-60, 60])
def test_a_resumed_run_goes_on_in_its_unit(run, power, tmp_path):
    A, path = definite(torch.float32) * 2.0**power, tmp_path / "run.safetensors"
    whole = RUNS[run](resumable(A, [], 0), None)
    for at in (2, 3, 9):
        path.unlink(missing_ok=True)
        with contextlib.suppress(KeyboardInterrupt):
            RUNS[run](resumable(A, [], at), path)
        assert torch.equal(RUNS[run](resumable(A, [], 0), path), whole)
