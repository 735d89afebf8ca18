"""Sums over batches in another dtype, models under autocast, compiled programs: options that are checked and told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import CheckpointError, Problem, ProblemError, block_diagonal, registry
from curvalg.estimate import eigsh

TERMS = ["ggn", "hessian", "covariance", "centered_covariance", "ggn_class", "kfac", "ggn_diagonal", "jacobian"]
CE = nn.CrossEntropyLoss()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(rows=2000, each=1):
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(rows, 6, generator=generator), torch.randint(3, (rows,), generator=generator)
    return list(zip(X.split(each), y.split(each), strict=True))


def products(term, **options):
    problem = Problem(net(), CE, data(300, 1), **options)
    op = registry.build(term).lower(problem)
    return op @ torch.randn(op.shape[1], 2, generator=torch.Generator().manual_seed(1))


def exact(term):
    problem = Problem(net().double(), CE, [(X.double(), y) for X, y in data(300, 100)])
    op = registry.build(term).lower(problem)
    return op @ torch.randn(op.shape[1], 2, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("cache", [0, 2**30])
@pytest.mark.parametrize("term", TERMS)
def test_float64_sums_give_float32_results(term, cache):
    got = products(term, accumulate=torch.float64, cache=cache)
    assert got.dtype == torch.float32
    expected = exact(term)
    assert (got - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("term", ["ggn", "covariance"])
def test_no_way_of_a_product_forgets_the_dtype_of_sums(term, take_way):
    """Thousands of batches that nearly cancel; V multiplied out would be summed by one kernel, in its own dtype."""
    X = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).expand(2000, 6)
    y = torch.tensor([0, 1] * 1000)
    batches = [(X[i : i + 1], y[i : i + 1]) for i in range(2000)]
    v = torch.randn(Problem(net(), CE, batches).size, generator=torch.Generator().manual_seed(1))
    whole = registry.build(term).lower(Problem(net().double(), CE, (X.double(), y), cache=0)) @ v.double()
    op = registry.build(term).lower(Problem(net(), CE, batches, accumulate=torch.float64, factored=True))
    got = op @ v
    assert "factored" in op.explain()
    assert "not multiplied out: sums over batches are asked for in torch.float64" in op.explain()
    assert (got - whole).norm() <= 1e-6 * whole.norm()


def test_float64_sums_are_nearer():
    """Many batches of one row, most of which cancel: the rounding of every addition counts."""
    X = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).expand(4000, 6)
    y = torch.tensor([0, 1] * 2000)
    batches = [(1e3 * X[i : i + 1], y[i : i + 1]) for i in range(4000)]
    errors = {}
    whole = Problem(net().double(), CE, (1e3 * X.double(), y)).gradient()
    for accumulate in (None, torch.float64):
        got = Problem(net(), CE, batches, accumulate=accumulate).gradient()
        errors[accumulate] = float((got - whole).norm() / whole.norm())
    assert errors[torch.float64] < 0.2 * errors[None]


@pytest.mark.parametrize("wrong", [torch.float16, torch.int64, "float64", 64])
def test_narrower_sums_are_refused(wrong):
    with pytest.raises(ProblemError, match="accumulate is a dtype at least as wide"):
        Problem(net(), CE, data(4, 4), accumulate=wrong)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_products_are_float32_and_close(term, dtype):
    got, expected = products(term, autocast=dtype), exact(term)
    assert got.dtype == torch.float32
    error = float((got - expected).norm() / expected.norm())
    assert 1e-6 < error < {torch.bfloat16: 5e-2, torch.float16: 6e-3}[dtype]


@pytest.mark.parametrize("term", ["ggn", "hessian", "covariance"])
def test_autocast_is_that_of_the_model_itself(term):
    """The same as a model that casts in its forward."""

    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    v = torch.ones(Problem(net(), CE, data(40, 20)).size)
    expected = registry.build(term).lower(Problem(Casting(), CE, data(40, 20))) @ v
    op = registry.build(term).lower(Problem(net(), CE, data(40, 20), autocast=torch.bfloat16))
    for _ in range(40):
        assert (op @ v - expected).norm() <= 2e-2 * expected.norm()
    assert torch.equal(op @ v, op @ v)
    blocks = block_diagonal(registry.build("ggn"), by="module")
    cast = blocks.lower(Problem(net(), CE, data(40, 20), autocast=torch.bfloat16)) @ v
    whole = blocks.lower(Problem(net(), CE, data(40, 20))) @ v
    assert 1e-6 < float((cast - whole).norm() / whole.norm()) < 5e-2


def test_a_dtype_that_autocast_has_not_is_refused():
    with pytest.raises(ProblemError, match=r"autocast is torch\.bfloat16"):
        Problem(net(), CE, data(4, 4), autocast=torch.float64)


def test_a_compiled_program_is_checked_and_told(take_way, inside):
    take_way("ordinary")
    inside(amortised=32)
    # Two backward passes win at first; then the program does.
    inside(measure=lambda candidates, *_: {way: 0.0 if way is True else 1.0 + n for n, way in enumerate(candidates)})
    v = torch.randn(Problem(net(), CE, data(40, 20)).size)
    problem = Problem(net(), CE, data(40, 20), compile="aot_eager")
    op = registry.build("ggn").lower(problem)
    first = op @ v
    for _ in range(inside["amortised"] + 4):
        assert (op @ v - first).norm() <= 1e-5 * first.norm()
    assert "a linearised program, compiled by aot_eager, verified and faster" in op.explain()
    many = op @ torch.stack([v, 2 * v, -v], 1)
    assert (many - torch.stack([first, 2 * first, -first], 1)).norm() <= 1e-5 * many.norm()


def test_a_compiled_program_that_is_wrong_is_not_used(take_way, monkeypatch, inside):
    take_way("ordinary")
    inside(amortised=32)
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda push, **options: lambda v: 1.001 * real(push, **options)(v))
    problem = Problem(net(), CE, data(40, 20), compile="eager")
    op = registry.build("ggn").lower(problem)
    v = torch.randn(problem.size)
    first = op @ v
    for _ in range(inside["amortised"] + 4):
        assert (op @ v - first).norm() <= 1e-5 * first.norm()
    assert "no linearised program: call 1 differs from the recorded graph" in op.explain()


def test_an_unknown_compiler_is_refused():
    with pytest.raises(ProblemError, match=r"a backend of torch\.compile"):
        Problem(net(), CE, data(4, 4), compile="gcc")


@pytest.mark.parametrize("options", [{"autocast": torch.bfloat16}, {"accumulate": torch.float64}])
def test_a_run_is_not_resumed_in_another_precision(options, tmp_path, products):
    path = tmp_path / "run.safetensors"
    products.interrupt(6)
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(6, 100), nn.Tanh(), nn.Linear(100, 3))  # too large to be diagonalised at once

    def largest(**options):
        op = registry.build("hessian").lower(Problem(wide, CE, data(40, 20), **options))
        return eigsh(op, 2, tol=1e-2, block=1, checkpoint=path)

    assert largest().partial
    with pytest.raises(CheckpointError, match="precision"):
        largest(**options)
