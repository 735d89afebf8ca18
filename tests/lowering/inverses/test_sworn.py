"""Structured inverses: right ones are accepted however they are conditioned, wrong ones refused, and looks cost nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from curvalg import (
    Block,
    ConvergenceError,
    Diagonal,
    Eigenbasis,
    Identity,
    Kronecker,
    LowRank,
    Problem,
    block_diagonal,
    inverse,
    registry,
)
from curvalg.lowering.inverses import swear
from curvalg.lowering.matrices import Blocks, Structure

N = 24


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(random(n, n, seed=seed))[0]


def spectrum(condition: float, n: int = N) -> torch.Tensor:
    return torch.logspace(0, -float(torch.tensor(condition).log10()), n, dtype=torch.float64)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return Problem(nn.Linear(7, 3), nn.MSELoss(), (torch.randn(9, 7), torch.randn(9, 3)))  # 24 parameters


def of_form(name: str, condition: float):
    """(expression, its matrix in float64) with a given condition number."""
    values = spectrum(condition)
    if name == "diagonal":
        return Diagonal(values), torch.diag(values)
    if name == "eigenbasis":
        q = orthogonal(N)
        return Eigenbasis(q, values), (q * values) @ q.T
    if name == "kronecker":
        a, b = ((q * spectrum(condition**0.5, len(q))) @ q.T for q in (orthogonal(4, 1), orthogonal(6, 2)))
        return Kronecker(a, b), torch.kron((a + a.T) / 2, (b + b.T) / 2)
    left = random(N, 5, seed=3) / N**0.5
    return LowRank(left) + Identity / condition, left @ left.T + torch.eye(N) / condition


FORMS = ["diagonal", "eigenbasis", "kronecker", "low rank"]


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e8, 1e10])
@pytest.mark.parametrize("name", FORMS)
def test_right_inverses_are_accepted_in_float32(name, condition, problem):
    expr, matrix = of_form(name, condition)
    op = inverse(expr).lower(problem)
    for b in (random(N, 2, seed=4).float(), (matrix @ random(N, 2, seed=5)).float()):
        x, result = op @ b, op.solve(b)
        assert result.ok
        for solution in (x, result.x):
            r = b.double() - matrix @ solution.double()
            error = r.norm(dim=0) / (
                torch.linalg.matrix_norm(matrix, 2) * solution.double().norm(dim=0) + b.norm(dim=0)
            )
            assert (error < 2e-6).all()


def wrong_solves(structure: Structure) -> Structure:
    right = structure.solve
    structure.solve = lambda b: 2 * right(b)  # type: ignore[method-assign]
    return structure


def wrong_matrix(structure: Structure) -> Structure:
    solve, multiply = structure.solve, structure.multiply
    structure.solve = lambda b: solve(b) / 3  # type: ignore[method-assign]
    structure.multiply = lambda x: 3 * multiply(x)  # type: ignore[method-assign]
    return structure


def not_finite(structure: Structure) -> Structure:
    structure.solve = lambda b: torch.full_like(b, torch.nan)  # type: ignore[method-assign]
    return structure


@pytest.mark.parametrize("plant", [wrong_solves, wrong_matrix, not_finite])
@pytest.mark.parametrize("condition", [1e2, 1e6, 1e8])
@pytest.mark.parametrize("name", FORMS)
def test_planted_structures_are_refused(name, condition, plant, problem, inside):
    at, planted = inside["structure"], {}

    def planting(self, snapshot):
        structure = at(self, snapshot)
        if id(structure) not in planted:
            planted[id(structure)] = structure
            plant(structure)
        return structure

    expr, _ = of_form(name, condition)
    op = inverse(expr).lower(problem)
    inside(structure=planting)
    with pytest.raises(ConvergenceError):
        op @ random(N, 2, seed=4).float()
    with pytest.raises(ConvergenceError):
        op.solve(random(N, 2, seed=4).float())


def test_a_small_block_is_judged_by_itself():
    class Scaled(Structure):
        def __init__(self, size, scale, wrong=1.0):
            super().__init__(size)
            self.scale, self.wrong = scale, wrong

        def multiply(self, x):
            return self.scale * x

        def solve(self, b):
            return self.wrong * b / self.scale

        mapped = trace = diagonal = logdet = eigh = lambda *_: None

    class Rows:
        def __init__(self, rows):
            self.rows = rows

        def take(self, x):
            return x[self.rows]

        def put(self, x, part):
            x[self.rows] = part

    def swears(wrong: float):
        parts = [(Rows(slice(0, 4)), Scaled(4, 1.0)), (Rows(slice(4, 8)), Scaled(4, 1e-12, wrong))]
        scales = torch.tensor([1.0] * 4 + [1e-12] * 4)[:, None]
        return swear(Blocks(parts), lambda x: scales * x, torch.zeros(1), 1e-7, 3)

    assert swears(1.0).solves and swears(1.0).right
    assert not swears(3.0).solves and not swears(3.0).right


def test_products_look_once_and_reports_are_made_when_asked_for(problem, inside):
    calls = []
    op = inverse(registry.build("ggn") + 1e-1 * Identity, solver="dense").lower(problem)
    b = random(N, 1, seed=4).float()
    op @ b
    apply = inside["sum_product"]
    inside(sum_product=lambda *args: calls.append(1) or apply(*args))
    x = op @ b
    assert not calls
    matrix = (registry.build("ggn") + 1e-1 * Identity).lower(problem).to_dense()
    calls.clear()
    residual = op.last_solve.residual
    assert calls and residual.shape == (1,) and bool(residual < 1e-5 * b.norm())
    assert torch.allclose(residual, (b - matrix @ x).norm(dim=0), atol=1e-5 * float(b.norm()))
    asked = inverse(registry.build("ggn") + 1e-1 * Identity, solver="dense", rtol=1e-6).lower(problem)
    asked @ b
    calls.clear()
    asked @ b
    assert calls  # a tolerance that was named is kept by every product


def problem_of(verify: bool) -> Problem:
    torch.manual_seed(0)
    return Problem(nn.Linear(7, 3), nn.MSELoss(), (torch.randn(9, 7), torch.randn(9, 3)), verify=verify)


def counting(inside) -> list[int]:
    """The columns of products by sums, which the matrices here are."""
    calls, apply = [], inside["sum_product"]
    inside(sum_product=lambda *args: calls.append(args[2].shape[1]) or apply(*args))
    return calls


@pytest.mark.parametrize("verify", [True, False])
def test_the_user_may_leave_the_look_out(verify, inside):
    op, b = inverse(LowRank(random(N, 3)) + Identity).lower(problem_of(verify)), random(N, 1, seed=4).float()
    calls = counting(inside)
    x = op @ b
    assert calls == ([3] if verify else [])
    calls.clear()
    assert op.solve(b).ok and len(calls) >= 1  # a report has residuals in any case
    calls.clear()
    assert torch.equal(op @ b, x) and not calls


def test_the_look_may_be_left_out_of_one_inverse(inside):
    """check=False takes no product of the matrix, and is carried by laws and blocks; others are still looked at."""
    matrix, b = LowRank(random(N, 3)) + Identity, random(N, 1, seed=4).float()
    problem, calls = problem_of(True), counting(inside)
    op = inverse(matrix, check=False).lower(problem)
    x = op @ b
    assert not calls and "not verified, as check=False asks" in op.explain()
    blocks = block_diagonal([Block(("weight",), LowRank(random(21, 3)) + Identity), Block(("bias",), 3 * Identity)])
    op = inverse(blocks + Identity, check=False).lower(problem)
    op @ b
    assert not calls and "not verified, as check=False asks" in op.explain()
    looked = inverse(matrix).lower(problem)
    assert torch.equal(looked @ b, x) and calls == [3]
    assert "verified: products" in looked.explain()
    multiple = inverse(3 * registry.build("kfac"), check=False)
    assert str(multiple.simplify()) == "inverse(kfac, check=False) / 3"
    assert op.solve(b).ok  # a report has residuals in any case


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\b(?:inf|[0-9.]+e[+-][0-9]+)", line)]


def figures(op) -> list[str]:
    return [line.strip() for line in op.explain().splitlines() if "relative errors" in line or "not compared" in line]


@pytest.mark.parametrize("name", FORMS)
def test_reports_say_what_was_verified_with_its_figures(name):
    expr, b = of_form(name, 1e2)[0], random(N, 1, seed=4).float()
    op = inverse(expr).lower(problem_of(True))
    assert not figures(op)  # nothing was solved yet
    op @ b
    (line,) = figures(op)
    assert line.startswith("verified: products and solves agree with products of the matrix; relative errors ")
    product, solve, allowed = numbers(line)
    assert product <= allowed and solve <= allowed and 0 < allowed < 1e-5
    trusting = inverse(expr).lower(problem_of(False))
    trusting @ b
    assert figures(trusting) == [
        "not verified, as verify=False asks: products and solves were not compared with the matrix"
    ]
    assert "nothing was verified" in trusting.explain() and "verified: products" not in trusting.explain()


def test_reports_name_the_largest_error_of_blocks():
    blocks = [Block(("weight",), registry.build("ggn") + 1e-1 * Identity), Block(("bias",), 3 * Identity)]
    op = inverse(block_diagonal(blocks)).lower(problem_of(True))
    op @ random(N, 1, seed=4).float()
    assert len(figures(op)) == 1


@pytest.mark.parametrize("plant", [wrong_solves, wrong_matrix, not_finite])
def test_reports_say_what_was_refuted(plant, problem, inside):
    at, planted = inside["structure"], {}

    def planting(self, snapshot):
        structure = at(self, snapshot)
        if id(structure) not in planted:
            planted[id(structure)] = plant(structure)
        return structure

    inside(structure=planting)
    for problem, refuses in ((problem_of(True), True), (problem_of(False), False)):
        op = inverse(of_form("eigenbasis", 1e2)[0]).lower(problem)
        if refuses:
            with pytest.raises(ConvergenceError):
                op @ random(N, 1).float()
            (line,) = figures(op)
            assert line.startswith("refuted: it does not agree with products of the matrix")
            assert max(numbers(line)) > 1e-2
        elif plant is not not_finite:
            op @ random(N, 1).float()  # at the user's word
    with pytest.raises(ConvergenceError):  # a report looks at residuals, and meets the tolerance or says so
        op.solve(random(N, 1).float())


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_scales_change_nothing(scale, problem):
    for name in FORMS:
        expr = of_form(name, 1e3)[0]
        op, b = inverse(expr).lower(problem), random(N, 2, seed=4).float()
        plain, result = op.solve(b), op.solve(scale * b)
        assert result.ok and torch.allclose(result.x / scale, plain.x, rtol=1e-4, atol=1e-5 * float(plain.x.norm()))
        assert torch.allclose(op @ (scale * b) / scale, plain.x, rtol=1e-4, atol=1e-5 * float(plain.x.norm()))


class Residual(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.a, self.b = nn.Conv2d(i, o, 3, stride, 1), nn.Conv2d(o, o, 3, 1, 1)
        self.skip = nn.Conv2d(i, o, 1, stride)

    def forward(self, x):
        return torch.relu(self.b(torch.relu(self.a(x))) + self.skip(x))


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_kfac_of_a_residual_network_is_inverted_in_float32(scale):
    torch.manual_seed(0)
    layers = [Residual(3, 6, 1), Residual(6, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    model = nn.Sequential(*layers)
    problem = Problem(model, nn.CrossEntropyLoss(), (torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))))
    damped = scale * registry.build("kfac") + 1e-2 * Identity
    op, b = inverse(damped).lower(problem), torch.randn(problem.size)
    x, matrix = op @ b, damped.lower(problem).to_dense().double()
    assert op.solve(b).ok
    r = b.double() - matrix @ x.double()
    assert r.norm() <= 2e-6 * (torch.linalg.matrix_norm(matrix, 2) * x.norm() + b.norm())


def test_blocks_of_small_and_large_curvature(problem):
    expr = block_diagonal(
        [Block(("weight",), 1e8 * Kronecker(torch.eye(3), torch.eye(7))), Block(("bias",), 1e-4 * Identity)]
    )
    b = random(N, 1, seed=4).float()
    x = inverse(expr).lower(problem) @ b
    assert torch.allclose(x[:21], b[:21] / 1e8, rtol=1e-5) and torch.allclose(x[21:], b[21:] * 1e4, rtol=1e-5)


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("solver", ["cg", "minres", "auto"])
def test_half_precision_solves_by_default(how, solver):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5))
    x, y = torch.randn(64, 10), torch.randint(0, 5, (64,))
    exact = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    exact.load_state_dict(model.state_dict())
    reference = Problem(exact, nn.CrossEntropyLoss(), (x.double(), y))
    dtype = torch.float32 if how == "autocast" else getattr(torch, how)
    problem = Problem(
        model.to(dtype), nn.CrossEntropyLoss(), (x.to(dtype), y), autocast=torch.bfloat16 if how == "autocast" else None
    )
    damped, b = registry.build("ggn") + 1e-1 * Identity, torch.randn(problem.size)
    matrix = damped.lower(reference).to_dense()
    result = inverse(damped, solver=solver).lower(problem).solve(b)
    assert result.ok, result.summary()
    expected = torch.linalg.solve(matrix, b.double())
    assert (result.x.double() - expected).norm() <= 0.1 * expected.norm()
