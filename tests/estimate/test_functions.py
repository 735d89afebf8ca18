"""Functions of operators times vectors against dense ones, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator

from curvalg import (
    CheckpointError,
    ConvergenceError,
    CurvalgWarning,
    ExpressionError,
    FactsError,
    Identity,
    Problem,
    ProblemError,
    VectorError,
    registry,
)
from curvalg.estimate import matrix_function
from tests.support.spectra import F64, SPECTRA, matrix

POSITIVE = matrix(torch.linspace(0.5, 20, 150, dtype=F64))
V = torch.randn(150, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
DENSE = {"sqrt": torch.sqrt, "inv_sqrt": torch.rsqrt, "exp": torch.exp, "log": torch.log, "cos": torch.cos}


def dense(A, function, x):
    values, vectors = torch.linalg.eigh(A.double())
    return vectors @ (function(values)[:, None] * (vectors.T @ x.double()))


@pytest.mark.parametrize("name", DENSE)
def test_against_dense(name):
    given = torch.cos if name == "cos" else name
    made = matrix_function(POSITIVE, given, V)
    truth = dense(POSITIVE, DENSE[name], V)
    error = (made.value - truth).norm(dim=0) / truth.norm(dim=0)
    assert float(error.max()) < 1e-8 and made.converged and made.method == "lanczos"
    assert bool((error <= made.changes + 1e-12).all()) and made.steps < 150


@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(name):
    A = matrix(SPECTRA[name])
    x = torch.randn(len(A), 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    made = matrix_function(A, "exp", x)
    torch.testing.assert_close(made.value, dense(A, torch.exp, x), rtol=1e-8, atol=1e-8)
    shifted = A @ A
    root = matrix_function(shifted + 0.1 * torch.eye(len(A), dtype=F64), "inv_sqrt", x)
    truth = dense(shifted + 0.1 * torch.eye(len(A), dtype=F64), torch.rsqrt, x)
    torch.testing.assert_close(root.value, truth, rtol=1e-8, atol=1e-8)


def test_roots_of_singular_operators():
    A = matrix(SPECTRA["low rank"]) @ matrix(SPECTRA["low rank"])
    x = torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=F64)
    made = matrix_function(A, "sqrt", x)
    torch.testing.assert_close(
        made.value, dense(A, lambda v: v.clamp_min(0).sqrt(), x[:, None])[:, 0], atol=1e-7, rtol=0
    )
    assert made.products <= 4 + 2


def test_batched_columns_are_single_columns():
    together = matrix_function(POSITIVE, "log", V, steps=30)
    for i in range(3):
        alone = matrix_function(POSITIVE, "log", V[:, i], steps=30)
        torch.testing.assert_close(together.value[:, i], alone.value, rtol=1e-9, atol=1e-9)
        assert alone.value.shape == (150,)
    assert together.products == 90 + 2


def test_columns_of_zeros_and_eigenvectors():
    x = V.clone()
    x[:, 1] = 0
    x[:, 2] = torch.linalg.eigh(POSITIVE).eigenvectors[:, 7]
    made = matrix_function(POSITIVE, "log", x)
    torch.testing.assert_close(made.value, dense(POSITIVE, torch.log, x), rtol=1e-8, atol=1e-8)
    assert not bool(made.value[:, 1].any()) and float(made.changes[1]) == 0
    zero = matrix_function(POSITIVE, "log", torch.zeros(150, dtype=F64))
    assert not bool(zero.value.any()) and zero.converged


def test_an_operator_that_returns_what_it_was_given():
    op = LinearOperator((9, 9), matvec=lambda x: x, matmat=lambda x: x, dtype=float)
    x = np.arange(9.0)
    assert np.allclose(matrix_function(op, "sqrt", x).value, x, rtol=1e-12, atol=0) and (x == np.arange(9.0)).all()


def test_float32_and_its_default_tolerance():
    made = matrix_function(POSITIVE.float(), "sqrt", V.float())
    truth = dense(POSITIVE, torch.sqrt, V)
    assert made.value.dtype == torch.float32
    assert float((made.value - truth).norm() / truth.norm()) < 1e-5


def problem() -> Problem:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3)).double()
    return Problem(net, torch.nn.CrossEntropyLoss(), (torch.randn(20, 10, dtype=F64), torch.randint(0, 3, (20,))))


@pytest.mark.parametrize("name", ["sqrt", "inv_sqrt", "log", "exp"])
def test_structure_gives_it_exactly(name, inside):
    op = (registry.build("ggn") + 0.5 * Identity).lower(problem())
    x = torch.randn(op.shape[0], 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    exact = matrix_function(op, name, x)
    assert exact.method == "exact" and exact.converged and not bool(exact.changes.any())
    torch.testing.assert_close(exact.value, dense(op.to_dense(), DENSE[name], x), rtol=1e-8, atol=1e-8)
    inside(cheap_function=0)
    iterated = matrix_function(op, name, x)
    assert iterated.method == "lanczos"
    torch.testing.assert_close(iterated.value, exact.value, rtol=1e-7, atol=1e-8)


def test_any_kind_of_vector_comes_back():
    op = (registry.build("ggn") + 0.5 * Identity).lower(problem())
    layout = {name: torch.randn(shape, dtype=F64) for name, shape in op.problem.layout.shapes.items()}
    made = matrix_function(op, "sqrt", layout).value
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in layout.items()}
    twice = matrix_function(op, "sqrt", made).value
    flat = torch.cat([v.flatten() for v in layout.values()])
    torch.testing.assert_close(torch.cat([v.flatten() for v in twice.values()]), op @ flat, rtol=1e-7, atol=1e-8)
    assert isinstance(matrix_function(POSITIVE, "sqrt", V.numpy()).value, np.ndarray)


def test_what_is_outside_the_domain():
    A = matrix(SPECTRA["indefinite"])
    x = torch.ones(90, dtype=F64)
    with pytest.raises(
        FactsError, match=r"sqrt needs nonnegative eigenvalues, but .* has the Ritz value -.*\+ c \* Identity"
    ):
        matrix_function(A, "sqrt", x)
    for name in ("log", "inv_sqrt"):
        with pytest.raises(FactsError, match=f"{name} needs positive eigenvalues, .* add damping"):
            matrix_function(A, name, x)
        with pytest.raises(FactsError, match=f"{name} needs positive eigenvalues"):
            matrix_function(torch.zeros(9, 9), name, torch.ones(9))
    with pytest.raises(FactsError, match="is not finite at the Ritz value"):
        matrix_function(torch.zeros(9, 9), lambda v: 1 / v, torch.ones(9))
    op = registry.build("ggn").lower(problem())
    with pytest.raises(FactsError, match="log needs positive eigenvalues, but ggn"):
        matrix_function(op, "log", torch.ones(op.shape[0], dtype=F64))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"function": "sine"}, ExpressionError, "expected one of 'sqrt', 'inv_sqrt', 'exp', 'log' or a function"),
        ({"function": 2}, ExpressionError, "expected one of"),
        ({"function": lambda v: v.sum()}, ExpressionError, "expected a function of a tensor, entry by entry"),
        ({"function": lambda v: 1.0}, ExpressionError, "entry by entry, but .* gave float"),
        ({"steps": 0}, ExpressionError, "expected steps"),
        ({"steps": "many"}, ExpressionError, "expected steps"),
        ({"tol": 0.0}, ExpressionError, "expected a relative tolerance"),
        ({"on_fail": "ignore"}, ExpressionError, "expected on_fail"),
        ({"vector": torch.ones(3)}, VectorError, "expected shape"),
        ({"vector": torch.full((150,), torch.nan)}, VectorError, "finite"),
        ({"op": torch.triu(POSITIVE)}, FactsError, "expected a symmetric operator"),
    ],
)
def test_refusals(options, kind, message):
    with pytest.raises(kind, match=message):
        matrix_function(**{"op": POSITIVE, "function": "sqrt", "vector": torch.ones(150, dtype=F64), **options})


def test_products_that_are_not_finite():
    count = [0]

    def product(x):
        count[0] += 1
        return POSITIVE.numpy() @ x if count[0] < 5 else np.full_like(x, np.nan)

    op = LinearOperator(POSITIVE.shape, matvec=product, matmat=product, dtype=float)
    with pytest.raises(ProblemError, match="expected finite products"):
        matrix_function(op, "sqrt", np.ones(150))


def test_a_tolerance_that_is_not_reached_is_loud(inside):
    inside(longest_function=20)
    A = matrix(torch.logspace(0, -8, 150, dtype=F64))
    with pytest.raises(ConvergenceError, match=r"still changes by .* after 20 steps") as caught:
        matrix_function(A, "log", V)
    assert not caught.value.result.converged and caught.value.result.value.shape == V.shape
    with pytest.warns(CurvalgWarning, match="still changes"):
        assert not matrix_function(A, "log", V, on_fail="warn").converged
    assert not matrix_function(A, "log", V, steps=15).converged
    one = matrix_function(A, "exp", V, steps=1)
    assert not one.converged and math.isinf(float(one.changes[0]))


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    path, count = tmp_path / "run.safetensors", [0, 12]

    def product(x):
        count[0] += 1
        if count[0] == count[1]:
            raise KeyboardInterrupt
        return POSITIVE.numpy() @ x

    op = LinearOperator(POSITIVE.shape, matvec=product, matmat=product, dtype=float)
    part = matrix_function(op, "log", V, checkpoint=path)
    assert part.partial and not part.converged
    done = matrix_function(op, "log", V, checkpoint=path)
    count[0] = 100
    whole = matrix_function(op, "log", V)
    assert torch.equal(done.value, whole.value) and done.products == whole.products
    with pytest.raises(CheckpointError, match="option function differs"):
        matrix_function(op, "sqrt", V, checkpoint=path)
