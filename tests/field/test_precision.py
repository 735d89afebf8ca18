"""Parameters of several dtypes, half precision, autocast, complex numbers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from curvalg import CurvalgError, Problem, ProblemError, registry
from tests.support.dense import Case, Dense
from tests.support.field.models import (
    CE,
    TERMS,
    N,
    R,
    X,
    Y,
    batches,
    ce,
    lower,
    mlp,
    ones,
    product,
    reference,
)


class TwoTypes(nn.Module):
    def __init__(self, double=False) -> None:
        super().__init__()
        self.body, self.head, self.double_body = nn.Linear(3, 4), nn.Linear(4, 3), double

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.to(self.body.weight.dtype))).double())


def test_parameters_of_several_dtypes(build_net, agrees):
    model = build_net(TwoTypes)
    model.body.float()
    expected = reference(copy.deepcopy(model).double())
    problem = Problem(model, CE, batches())
    op = lower("hessian", problem)
    assert op.dtype == np.float64
    assert problem.dtype == torch.float64
    agrees(problem, expected, tolerance=1e-5)
    tree = op @ problem.layout.unflatten(torch.ones(problem.size))
    assert torch.allclose(problem.layout.flatten(tree), op @ ones(op))
    diagonal = registry.build("covariance_diagonal").lower(problem) @ torch.ones(problem.size).double()
    assert torch.allclose(diagonal, expected.covariance.diag(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [*TERMS, "jacobian"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_finite_float32_products(dtype, name, build_net, vectors):
    half = build_net(mlp).to(dtype)
    data = [(x.to(dtype), y) for x, y in batches()]
    op = lower(name, Problem(half, CE, data))
    assert op.dtype == np.float32
    exact = Dense(Case(copy.deepcopy(half).double(), None, [(x.double(), y) for x, y in data], ce, float(N)))
    V = vectors(op.shape[1], 2).float()
    got, expected = op @ V, exact.matrix(name) @ V.double()
    assert got.dtype == torch.float32
    assert torch.isfinite(got).all()
    error = (got.double() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype], float(error)
    assert (op @ np.ones(op.shape[1], np.float32)).dtype == np.float32


def test_half_precision_sums_over_many_batches_in_float32(build_net):
    """In half precision the sum would stop growing: 1e-3 added to 4 is 4."""
    model = build_net(nn.Linear, 1, 1, dtype=torch.float16)
    data = [(torch.ones(1, 1).half(), torch.zeros(1, 1))] * 5000
    op = lower("ggn", Problem(model, nn.MSELoss(reduction="sum"), data))
    assert abs(float((op @ np.array([1.0, 0.0], np.float32))[0]) - 10000) < 1


@pytest.mark.parametrize("name", [*TERMS, "covariance_diagonal", "jacobian"])
def test_half_precision_that_overflows_is_refused_not_nan(name, build_net):
    model = build_net(mlp).half()
    with torch.no_grad():
        model[2].weight.mul_(1e5)
    data = [(x.half(), y) for x, y in batches()]
    with pytest.raises(ProblemError, match="NaN or infinite"):
        product(name, model, CE, data)


@pytest.mark.parametrize("name", [*TERMS, "covariance_diagonal"])
def test_autocast_around_the_product_changes_nothing(name, build_net, vectors):
    problem = Problem(build_net(mlp), CE, batches())
    expected = (
        reference(build_net(mlp)).matrix(name) if name in TERMS else reference(build_net(mlp)).covariance.diag().diag()
    )
    V = vectors(problem.size, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = registry.build(name).lower(problem) @ V
        assert torch.is_autocast_enabled("cpu")
    assert (got - expected @ V).norm() < 1e-10 * (expected @ V).norm()
    with torch.autocast("cpu", torch.bfloat16):
        fresh = Problem(build_net(mlp), CE, batches())
        assert abs(fresh.value() - CE(build_net(mlp)(X).double(), Y).item()) < 1e-2
        assert torch.equal(fresh.gradient(), problem.gradient())


class Cast(nn.Module):
    def __init__(self, dtype) -> None:
        super().__init__()
        self.inner, self.dtype = mlp(), dtype

    def forward(self, x):
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            return self.inner(x)


@pytest.mark.parametrize("name", [*TERMS, "jacobian"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_forward_gives_finite_float32_products(dtype, name, build_net, vectors):
    model = build_net(Cast, dtype, dtype=torch.float32)
    data = [(x.float(), y) for x, y in batches()]
    op = lower(name, Problem(model, CE, data))
    V = vectors(op.shape[1], 2).float()
    first = op @ V
    expected = reference(build_net(Cast, None)).matrix(name) @ V.double()
    assert op.dtype == np.float32
    assert torch.isfinite(first).all()
    error = (first.double() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype], float(error)
    for _ in range(2):
        assert torch.equal(op @ V, first)


def test_float32_models_are_not_declared_float64(build_net):
    model = build_net(mlp, dtype=torch.float32)
    data = [(x.float(), y) for x, y in batches()]
    op = lower("hessian", Problem(model, CE, data))
    assert op.dtype == np.float32
    assert (op @ np.ones(op.shape[1], np.float32)).dtype == np.float32


def test_model_of_another_dtype_than_its_data_is_explained(build_net):
    with pytest.raises((CurvalgError, RuntimeError), match="dtype"):
        product("hessian", build_net(mlp, dtype=torch.float32), CE, batches())


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_parameters_are_refused():
    model = nn.Linear(3, 3).to(torch.complex128)
    with pytest.raises(ProblemError, match=r"'weight' is complex.*view_as_real"):
        Problem(model, nn.MSELoss(), batches())
    with pytest.raises(ProblemError, match="complex"):
        Problem(lambda p, x: x @ p["w"], nn.MSELoss(), batches(), params={"w": torch.randn(3, 3).cfloat()})


def test_complex_parameters_by_real_and_imaginary_parts(build_net, agrees):
    """The cure of the message."""

    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3, 2))

        def forward(self, x):
            return (x.to(torch.complex128) @ torch.view_as_complex(self.w)).abs()

    model = build_net(Complex)
    agrees(Problem(model, CE, batches()), reference(model), terms=("hessian", "ggn", "covariance"))


def test_complex_outputs_are_refused(build_net):
    class Phase(nn.Linear):
        def forward(self, x):
            return torch.complex(super().forward(x), x)

    with pytest.raises(ProblemError, match=r"floating-point tensor.*forward="):
        product("hessian", build_net(Phase, 3, 3), nn.MSELoss(), batches(X, R))


def test_complex_parameters_that_are_not_chosen_are_allowed(build_net, agrees):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.phase = mlp(), nn.Parameter(torch.ones(3, dtype=torch.complex128), requires_grad=False)

        def forward(self, x):
            return self.inner((x * self.phase).real)

    model = Both()
    model.inner.double()
    agrees(Problem(model, CE, batches()), reference(model), terms=("hessian", "covariance"))
