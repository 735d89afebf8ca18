"""Hessian products by differences of gradients: the estimate bounds the error, and only first derivatives are needed."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvalg import (
    CurvalgError,
    GradientField,
    Identity,
    OptionError,
    Problem,
    ProblemError,
    block_diagonal,
    inverse,
    registry,
    restrict,
)
from curvalg.estimate import eigsh, trace
from curvalg.testing import check_term, default_problems
from curvalg_plugins.differences import HessianDifference

build = registry.build
ESTIMATES = []


@dataclass(frozen=True)
class Watched(HessianDifference):
    """The same matrix, which tells the estimated error of each product."""

    def multiply(self, gradients: GradientField, vector: torch.Tensor) -> torch.Tensor:
        product = super().multiply(gradients, vector)
        last = gradients.kept["last"]
        ESTIMATES.append((last.truncation + last.rounding) * gradients.norm(vector))
        return product


class Attention(nn.Module):
    """A block of a small GPT: tokens, fused attention, a head with the classes on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.mixed, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.wide, self.narrow, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 7)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        x = self.tokens(t)
        q, k, v = self.mixed(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(x + self.narrow(F.gelu(self.wide(x)))).transpose(1, 2)


def mlp(seed: int, dtype: torch.dtype) -> Problem:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    X, y = torch.randn(20, 5).to(dtype), torch.randint(0, 3, (20,))
    y[3] = -100
    loss = nn.CrossEntropyLoss(weight=(torch.rand(3) + 0.5).to(dtype), reduction="sum" if seed % 2 else "mean")
    return Problem(net, loss, [(X[:13], y[:13]), (X[13:], y[13:])])


def gpt(seed: int, dtype: torch.dtype) -> Problem:
    torch.manual_seed(seed)
    tokens = torch.randint(0, 7, (6, 5))
    return Problem(
        Attention().to(dtype), nn.CrossEntropyLoss(), [(tokens[:4], tokens[:4].roll(1, 1)), (tokens[4:], tokens[4:])]
    )


def exact(problem: Problem, V: torch.Tensor) -> torch.Tensor:
    """The product with the Hessian, in double precision at the same parameters."""
    model = copy.deepcopy(problem.model.module).double()
    loss = copy.deepcopy(problem.data), copy.deepcopy(problem._given[0])
    batches = [tuple(t.double() if t.is_floating_point() else t for t in batch) for batch in loss[0].source]
    return build("hessian").lower(Problem(model, loss[1].double(), batches)) @ V.double()


def vectors(problem: Problem, seed: int = 0) -> torch.Tensor:
    """A random vector, the gradient, and unit vectors."""
    random = torch.randn(problem.size, 2, generator=torch.Generator().manual_seed(seed))
    units = torch.eye(problem.size)[:, [0, problem.size // 2, problem.size - 1]]
    return torch.cat([random.to(problem.dtype), problem.gradient()[:, None], units.to(problem.dtype)], 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("make", [mlp, gpt])
@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_bounds_the_error(make, seed, dtype):
    problem = make(seed, dtype)
    V = vectors(problem, seed)
    wanted = exact(problem, V)
    ESTIMATES.clear()
    errors = (Watched().lower(problem) @ V - wanted).norm(dim=0)
    estimates = torch.tensor(ESTIMATES, dtype=torch.float64)
    assert (errors <= estimates).all(), (errors / estimates).tolist()
    good = 1e-7 if dtype == torch.float64 else 3e-3
    assert (estimates <= good * wanted.norm(dim=0).max()).all()


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4, 1e-5])
def test_the_estimate_bounds_the_error_at_every_step(step):
    problem = mlp(1, torch.float32)
    V = vectors(problem)
    wanted = exact(problem, V)
    ESTIMATES.clear()
    errors = (Watched(step=step, tol=1e9).lower(problem) @ V - wanted).norm(dim=0)
    assert (errors <= torch.tensor(ESTIMATES)).all(), (errors, ESTIMATES)


def test_a_linear_model_with_squares_is_exact_but_for_rounding():
    torch.manual_seed(0)
    problem = Problem(nn.Linear(4, 2).double(), nn.MSELoss(), (torch.randn(9, 4).double(), torch.randn(9, 2).double()))
    V = torch.randn(problem.size, 3).double()
    wanted = build("hessian").lower(problem) @ V
    for step in (None, 1.0, 1e3):
        got = build("hessian_fd", step=step).lower(problem) @ V
        assert (got - wanted).norm() <= 2e-13 * wanted.norm()


def test_scaling_a_vector_scales_its_product():
    for dtype in (torch.float64, torch.float32):
        problem = mlp(2, dtype)
        v = torch.randn(problem.size, dtype=dtype)
        op, wanted = build("hessian_fd").lower(problem), exact(problem, v)
        error = (op @ v - wanted).norm() / wanted.norm()
        for scale in (1e20, 1e-20):
            scaled = ((op @ (v * scale)).double() / scale - wanted).norm() / wanted.norm()
            assert scaled <= 2 * error + 1e-12
            assert error <= 2 * scaled + 1e-12


def test_zero_and_several_columns():
    problem = mlp(0, torch.float64)
    op, V = build("hessian_fd").lower(problem), vectors(problem)
    V[:, 1] = 0
    together = op @ V
    assert not together[:, 1].any()
    assert torch.equal(together, torch.stack([op @ v for v in V.T], 1))
    assert torch.equal(op @ V[:, 0], op @ V[:, 0])


def test_parameters_that_are_all_zero():
    net = nn.Linear(3, 2).double()
    for p in net.parameters():
        p.data.zero_()
    problem = Problem(net, nn.CrossEntropyLoss(), (torch.randn(6, 3).double(), torch.randint(0, 2, (6,))))
    got, wanted = (build(name).lower(problem).to_dense() for name in ("hessian_fd", "hessian"))
    assert (got - wanted).norm() <= 1e-7 * wanted.norm()


@pytest.mark.parametrize(("step", "cure"), [(3.0, "smaller step="), (1e-7, "larger step=")])
def test_a_step_that_is_too_large_or_too_small_is_refused(step, cure):
    problem = mlp(0, torch.float32)
    with pytest.raises(ProblemError, match=cure) as refused:
        build("hessian_fd", step=step).lower(problem) @ torch.randn(problem.size)
    assert all(word in str(refused.value) for word in ("float64", "hessian, which is exact", "tol="))


def test_without_a_tolerance_nothing_is_refused_and_half_the_gradients_are_taken(counted_model):
    problem, calls = counted_model("mlp")
    batches, v = 3, torch.randn(problem.size).double()
    for tol, number in ((0.01, 4), (None, 2)):
        op = build("hessian_fd", tol=tol).lower(problem)
        op @ v
        before = calls()
        op @ v
        assert calls() - before == number * batches
    assert (op @ v).isfinite().all()
    build("hessian_fd", tol=None, step=1e-9).lower(mlp(0, torch.float32)) @ torch.ones(mlp(0, torch.float32).size)


def test_half_precision_weights_are_refused_or_within_the_estimate():
    problem = mlp(0, torch.bfloat16)
    v = torch.randn(problem.size)
    with pytest.raises(ProblemError, match="estimated error"):
        build("hessian_fd").lower(problem) @ v
    ESTIMATES.clear()
    error = (Watched(tol=1e9).lower(problem) @ v - exact(problem, v)).norm()
    assert error <= ESTIMATES[0]


class Once(torch.autograd.Function):
    """tanh, whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(y := x.tanh())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        (y,) = ctx.saved_tensors
        return cotangent * (1 - y**2)


class OnceDifferentiable(nn.Module):
    """A layer between two others that has no double backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(Once.apply(self.first(x)))


def test_a_model_without_a_second_derivative():
    torch.manual_seed(0)
    net, data = OnceDifferentiable().double(), (torch.randn(9, 4).double(), torch.randint(0, 3, (9,)))
    problem = Problem(net, nn.CrossEntropyLoss(), data)
    v = torch.randn(problem.size).double()
    with pytest.raises(CurvalgError):
        build("hessian").lower(problem) @ v
    same = nn.Sequential(net.first, nn.Tanh(), net.second)
    wanted = build("hessian").lower(Problem(same, nn.CrossEntropyLoss(), data)) @ v
    got = build("hessian_fd").lower(problem) @ v
    assert (got - wanted).norm() <= 1e-7 * wanted.norm()


def test_parts_and_sums(problem_of, dense_of):
    dense, problem = dense_of("tied_embedding"), problem_of("tied_embedding")
    fd, H = build("hessian_fd"), dense.hessian
    name = problem.layout.names[0]
    at = problem.layout.slices[name]
    near = {"atol": 1e-7 * float(H.norm()), "rtol": 0.0}
    assert torch.allclose(restrict(fd, name).lower(problem).to_dense(), H[at, at], **near)
    blocks = block_diagonal(fd).lower(problem).to_dense()
    assert torch.allclose(blocks[at, at], H[at, at], **near)
    expr = 2 * fd + build("ggn") - 0.5 * Identity
    assert torch.allclose(expr.lower(problem).to_dense(), 2 * H + dense.ggn - 0.5 * torch.eye(len(H)), **near)
    assert torch.allclose((fd @ build("ggn")).lower(problem).to_dense(), H @ dense.ggn, **near)


def test_estimators_take_it(problem_of, dense_of):
    dense, problem = dense_of("mlp"), problem_of("mlp")
    op = build("hessian_fd").lower(problem)
    assert op.facts.symmetric
    values = torch.linalg.eigvalsh(dense.hessian)
    found = eigsh(op, 3, which="LA").eigenvalues
    assert torch.allclose(torch.as_tensor(found), values[-3:], atol=1e-6)
    assert math.isclose(trace(op).value, float(values.sum()), rel_tol=1e-5)
    b = torch.randn(problem.size).double()
    solved = inverse(build("hessian_fd") + 2 * Identity, solver="minres", rtol=1e-6).lower(problem) @ b
    wanted = torch.linalg.solve(dense.hessian + 2 * torch.eye(dense.D), b)
    assert (solved - wanted).norm() <= 1e-5 * wanted.norm()


def test_explain_says_step_error_and_cost():
    problem = mlp(0, torch.float64)
    op = build("hessian_fd").lower(problem)
    assert "found at the first product" in op.explain()
    op @ torch.ones(problem.size, dtype=torch.float64)
    told = op.explain()
    assert all(
        words in told
        for words in ("4 gradients a product", "‖θ‖", "noise of a gradient", "estimated error", "truncation")
    )


def test_nothing_is_mutated():
    problem = mlp(0, torch.float64)
    module = problem.model.module
    before = [p.detach().clone() for p in module.parameters()]
    places = [p.data_ptr() for p in module.parameters()]
    state = torch.get_rng_state()
    build("hessian_fd").lower(problem) @ torch.ones(problem.size, 2, dtype=torch.float64)
    assert all(torch.equal(a, p) and p.grad is None for a, p in zip(before, module.parameters(), strict=True))
    assert places == [p.data_ptr() for p in module.parameters()]
    assert torch.equal(state, torch.get_rng_state())


def test_a_step_of_the_model_is_noticed():
    problem = mlp(0, torch.float64)
    v = torch.ones(problem.size, dtype=torch.float64)
    op = build("hessian_fd").lower(problem)
    op @ v
    problem.step(v, 0.1)
    with pytest.raises(CurvalgError, match="refresh"):
        op @ v
    got, wanted = op.refresh() @ v, build("hessian").lower(problem) @ v
    assert (got - wanted).norm() <= 1e-7 * wanted.norm()


@pytest.mark.parametrize("options", [{"step": 0}, {"step": -1.0}, {"tol": 0.0}, {"tol": math.inf}, {"step": True}])
def test_wrong_options(options):
    with pytest.raises(OptionError):
        build("hessian_fd", **options)


def test_the_contract():
    check_term("hessian_fd", problems=[problem for problem in default_problems() if problem.size == 24][:2])


def test_no_warning_of_linear_algebra_is_left():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = gpt(0, torch.float32)
        build("hessian_fd").lower(problem) @ torch.ones(problem.size)
