"""Preconditioners for the Krylov path: Nyström, diagonals, blocks, and whatever else has a structured inverse."""

from __future__ import annotations

import pytest
import torch

from curvalg import (
    Diagonal,
    ExpressionError,
    FactsError,
    Identity,
    LowRank,
    Problem,
    StaleError,
    block_diagonal,
    diagonal_part,
    inverse,
    nystrom,
    registry,
    restrict,
)
from tests.support.built_in import BUILT_IN
from tests.support.structures import JointKronecker, random

GGN = registry.build("ggn")


@pytest.fixture
def problem(problem_of):
    return problem_of("mlp")


@pytest.fixture
def dense(dense_of):
    return dense_of("mlp")


def sketch(n: int, rank: int, seed: int) -> torch.Tensor:
    """The documented Ω: orthonormalised standard normal columns."""
    noise = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


@pytest.mark.parametrize(("rank", "seed"), [(1, 0), (5, 0), (5, 3), (14, 1)])
def test_nystrom_is_its_formula(rank, seed, problem, dense, vectors):
    omega, A = sketch(dense.D, rank, seed), dense.ggn
    Y = A @ omega
    expected = Y @ torch.linalg.pinv(omega.T @ Y) @ Y.T
    got = nystrom(GGN, rank, seed=seed).lower(problem).to_dense()
    assert torch.allclose(got, expected, atol=1e-10)
    assert torch.linalg.eigvalsh(got)[0] >= -1e-12
    if rank >= 14:  # the rank of the matrix: nothing is lost
        assert torch.allclose(got, A, atol=1e-9)


def test_nystrom_keeps_a_shift_exact_and_restricts(problem, dense, vectors):
    V = vectors(dense.D)
    expr = nystrom(2 * GGN + 0.5 * Identity, 4)
    whole = nystrom(2 * GGN, 4).lower(problem).to_dense()
    assert torch.allclose(expr.lower(problem) @ V, whole @ V + 0.5 * V, atol=1e-10)
    solved = inverse(expr).lower(problem)
    assert torch.allclose(solved @ V, torch.linalg.solve(whole + 0.5 * torch.eye(dense.D), V), atol=1e-9)
    assert "woodbury: chosen" in solved.explain()
    part = nystrom(restrict(GGN, "0.*"), 8).lower(problem)
    size = part.shape[0]
    omega, A = sketch(size, 8, 0), dense.ggn[:size, :size]
    expected = A @ omega @ torch.linalg.pinv(omega.T @ A @ omega) @ omega.T @ A
    assert torch.allclose(part @ V[:size], expected @ V[:size], atol=1e-9)


def test_what_has_no_nystrom_approximation(problem, dense):
    values = torch.ones(dense.D).double()
    values[3] = -5.0
    with pytest.raises((FactsError, ExpressionError), match="positive semi-definite"):
        nystrom(Diagonal(values), 43).lower(problem) @ values
    with pytest.raises((FactsError, ExpressionError), match="positive semi-definite"):
        nystrom(registry.build("hessian"), 43).lower(problem) @ values


CANDIDATES = {
    "nystrom": lambda c: nystrom(GGN, 14) + c * Identity,
    "diagonal": lambda c: diagonal_part(GGN) + c * Identity,
    "blocks": lambda c: block_diagonal(GGN + c * Identity, by="module"),
    "kronecker": lambda c: JointKronecker() + c * Identity,
    "low rank": lambda c: LowRank(random(43, 3)) + c * Identity,
    "itself": lambda c: GGN + c * Identity,
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_any_structured_expression_preconditions(name, problem, dense, vectors):
    c = 1e-3
    op = inverse(GGN + c * Identity, solver="cg", preconditioner=CANDIDATES[name](c), rtol=1e-10).lower(problem)
    V = vectors(dense.D)
    A = dense.ggn + c * torch.eye(dense.D)
    assert torch.allclose(op @ V, torch.linalg.solve(A, V), atol=1e-5)
    if name in ("nystrom", "itself"):
        assert int(op.last_solve.iterations.max()) <= 3
    given = inverse(GGN + c * Identity, solver="cg", rtol=1e-10).lower(problem, preconditioner=CANDIDATES[name](c))
    assert torch.allclose(given @ V, op @ V, atol=1e-6)


def test_an_iterative_preconditioner_is_refused(problem, inside):
    inside(dense_limit=10)
    many = registry.build("ggn_mc", samples=7) + Identity  # more columns than parameters, so only CG is left
    with pytest.raises(ExpressionError, match="itself be inverted by cg"):
        inverse(GGN + Identity, solver="cg", preconditioner=many).lower(problem)


def test_digits_take_a_fifth_of_the_products():
    """Damping of 1e-5 of the largest eigenvalue: plain conjugate gradients against Nyström and layer blocks."""
    problem = BUILT_IN["digits"]()
    op = GGN.lower(problem)
    v = torch.ones(problem.size)
    for _ in range(30):
        v = op @ (v / v.norm())
    c = 1e-5 * float(v.norm())
    g = problem.gradient()
    iterations = {}
    for name, preconditioner in {"plain": None, "nystrom": nystrom(GGN, 400) + c * Identity}.items():
        solve = inverse(GGN + c * Identity, solver="cg", rtol=1e-4, preconditioner=preconditioner).lower(problem)
        iterations[name] = int(solve.solve(g).iterations)
    assert iterations["nystrom"] <= iterations["plain"] / 5


class Centred(torch.nn.Module):
    """Positions are centred and scaled, so that the first bias changes nothing: its curvature is zero up to rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(torch.tanh((h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True))).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_zero_up_to_rounding_has_the_nystrom_approximation_zero(seed, dtype):
    torch.manual_seed(seed)
    model, bias = Centred().to(dtype), "first.bias"
    data = (torch.randn(6, 5, 3, dtype=dtype), torch.randint(0, 2, (6,)))
    problem = Problem(model, torch.nn.CrossEntropyLoss(), data)
    parts = [registry.build(f"ggn_{part}") for part in ("class", "cross", "within", "same")]
    for expr in (
        *(nystrom(restrict(registry.build(name), bias), 3) for name in ("ggn", "covariance", "hessian")),
        nystrom(GGN - sum(parts), 3),
        block_diagonal({bias: nystrom(GGN, 3)}),
        nystrom(block_diagonal(GGN, by=[[bias]]), 4),
    ):
        op = expr.lower(problem)
        size = float((GGN.lower(problem) @ torch.eye(problem.size, dtype=dtype)).norm())
        assert float((op @ torch.eye(op.shape[0], dtype=dtype)).norm()) <= 1e3 * torch.finfo(dtype).eps * size
    with pytest.raises(FactsError, match="not positive semi-definite"):
        nystrom(registry.build("residual") / 1000, 20).lower(problem) @ torch.ones(problem.size, dtype=dtype)


def test_a_stale_preconditioner_is_named(problem_of, vectors):
    problem = problem_of("mlp")
    damped = registry.build("ggn") + 0.1 * Identity
    helper = (registry.build("kfac") + 0.1 * Identity).lower(problem)
    op = inverse(damped, solver="cg").lower(problem, preconditioner=helper)
    op @ vectors(problem.size)
    with torch.no_grad():
        next(iter(problem.model.chosen.values())).add_(0.1)
    op.refresh()
    with pytest.raises(StaleError, match=r"the preconditioner .* call its refresh\(\) as well"):
        op @ vectors(problem.size)
    helper.refresh()
    op @ vectors(problem.size)


def test_a_preconditioner_without_an_inverse_is_named(problem_of, vectors):
    problem = problem_of("mlp")
    hole = Diagonal(torch.zeros(problem.size).double())
    op = inverse(registry.build("ggn") + 0.1 * Identity, solver="cg", preconditioner=hole).lower(problem)
    with pytest.raises(FactsError, match=r"the preconditioner .* has no inverse"):
        op @ vectors(problem.size)


def test_a_solver_that_was_asked_for_and_declines_gives_way_by_a_word(problem_of):
    with pytest.raises(FactsError, match="leave out solver=, or name another"):
        inverse(registry.build("ggn") + 0.1 * Identity, solver="function").lower(problem_of("mlp"))
