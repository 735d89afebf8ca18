"""The first solves at a state take conjugate gradients where an exact form pays for many only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import CurvalgWarning, CurvatureOperator, Identity, Problem, block_diagonal, inverse, registry

GGN = registry.build("ggn")
N, CLASSES = 520, 3
SMALL, GRAM, DENSE = 1024, 32, 4
"""Rows below which a form is made at once; rows of a Gram matrix and of a dense one that are made in the time of a product."""
PRICE = N * (CLASSES - 1) // GRAM
"""In products; the Gram matrix has a column for each degree of freedom of the probabilities."""


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(N, 60, dtype=torch.float64, generator=generator)
    return X, torch.randint(0, CLASSES, (N,), generator=generator)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 20), nn.Tanh(), nn.Linear(20, CLASSES)).double()


@pytest.fixture
def problem(model):
    return Problem(model, nn.CrossEntropyLoss(), data())


def solutions(model: nn.Module, damping: float, b: torch.Tensor) -> torch.Tensor:
    """(G + c I)⁻¹ b by torch alone, with G = N⁻¹ Σ Jᵀ (diag p − p pᵀ) J."""
    params = {k: v.detach() for k, v in model.named_parameters()}
    X, _ = data()
    parts = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (X,)))(params)
    J = torch.cat([parts[k].reshape(N, CLASSES, -1) for k in params], 2)
    p = model(X).detach().softmax(1)
    B = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    G = torch.einsum("nci,ncd,ndj->ij", J, B, J) / N
    return torch.linalg.solve(G + damping * torch.eye(len(G), dtype=G.dtype), b)


def vectors(op: CurvatureOperator, count: int = 1) -> torch.Tensor:
    v = torch.randn(op.shape[0], count, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return v / v.norm(dim=0)


def iterations(op: CurvatureOperator) -> int:
    """Of the last solve, by all columns."""
    assert op.last_solve is not None
    return int(op.last_solve.iterations.sum())


def test_one_solve_takes_its_iterations_alone(problem, model):
    op = inverse(GGN + 0.1 * Identity).lower(problem)
    v = vectors(op)
    x = op @ v
    assert 0 < iterations(op) <= PRICE
    assert torch.allclose(x, solutions(model, 0.1, v), rtol=0, atol=1e-7)  # 1e-9 of the residual, over the damping
    assert "gram: chosen" in op.explain() and f"{PRICE} products" in op.explain()


def test_the_form_is_made_when_solves_have_taken_its_price(problem, model):
    op = inverse(GGN + 0.1 * Identity).lower(problem)
    v, taken = vectors(op), [1]
    while taken[-1]:
        assert len(taken) < 10
        x = op @ v
        taken.append(iterations(op))
    assert len(taken) > 2
    assert sum(taken[1:]) <= PRICE
    assert torch.allclose(x, solutions(model, 0.1, v), rtol=0, atol=1e-11)
    op @ vectors(op)
    assert iterations(op) == 0


def test_another_damping_uses_what_is_made(problem, model):
    v = vectors(inverse(GGN + 0.1 * Identity).lower(problem), 40)
    _ = inverse(GGN + 0.1 * Identity).lower(problem) @ v
    other = inverse(2 * GGN + 0.3 * Identity).lower(problem), inverse(GGN + 0.2 * Identity).lower(problem)
    x = other[1] @ v[:, :1]
    assert iterations(other[1]) == 0
    assert torch.allclose(x, solutions(model, 0.2, v[:, :1]), rtol=0, atol=1e-11)


def test_many_dampings_with_a_solve_each_take_the_price_once(problem):
    taken = 0
    for i in range(12):
        op = inverse(GGN + (0.1 + 0.01 * i) * Identity).lower(problem)
        _ = op @ vectors(op)
        taken += iterations(op)
    assert 0 < taken <= PRICE
    assert iterations(op) == 0


CALLS: list[int] = []


class Counted(nn.Identity):
    """Says when the model is called."""

    def forward(self, x):
        CALLS.append(len(x))
        return x


def calls_of_a_solve_at_a_second_state(solver: str) -> int:
    """Of the model, where nothing is kept, so that every product calls it."""
    torch.manual_seed(0)
    model = nn.Sequential(Counted(), nn.Linear(60, 20), nn.Tanh(), nn.Linear(20, CLASSES)).double()
    problem = Problem(model, nn.CrossEntropyLoss(), data(), cache=0)
    A = GGN + 1e-9 * Identity
    op = inverse(A, solver=solver).lower(problem)
    v = problem.gradient()[:, None]
    for _ in range(2):
        CALLS.clear()
        x = op @ v
        assert iterations(op) == 0
        assert (A.lower(problem) @ x - v).norm() < 1e-8 * v.norm()
        with torch.no_grad():
            model[1].weight += 0.01
        before = len(CALLS)
        op.refresh()
        v = problem.gradient()[:, None]
    return before


def test_where_conjugate_gradients_do_not_get_there_the_form_does_and_they_are_not_tried_again():
    assert calls_of_a_solve_at_a_second_state("auto") <= calls_of_a_solve_at_a_second_state("gram") + 1


def test_many_columns_are_solved_by_the_form(problem):
    op = inverse(GGN + 0.1 * Identity).lower(problem)
    _ = op @ vectors(op, 8)
    assert iterations(op) == 0


def test_who_announces_many_products_gets_the_form(problem):
    op = inverse(GGN + 1.0 * Identity).lower(problem)
    with problem.measured.expected.at_most(3):  # as estimators do
        _ = op @ vectors(op)
    assert iterations(op) == 0  # three solves would not have taken the price


def test_a_preconditioner_is_the_form(problem):
    P = GGN + 1.0 * Identity
    op = inverse(registry.build("hessian") + 4.0 * Identity, solver="cg", preconditioner=P, maxiter=1, on_fail="warn")
    lowered = op.lower(problem)
    with pytest.warns(CurvalgWarning, match="1 of 1|maxiter"):
        lowered @ vectors(lowered)
    alone = inverse(P).lower(problem)
    _ = alone @ vectors(alone)
    assert iterations(alone) == 0  # it was made at once: a preconditioner is one fixed linear map


def test_options_of_the_user_count(problem, model):
    v = vectors(inverse(GGN + 0.1 * Identity).lower(problem))
    named = inverse(GGN + 0.1 * Identity, solver="gram").lower(problem)
    _ = named @ v
    assert iterations(named) == 0
    strict = inverse(GGN + 0.1 * Identity, rtol=1e-12).lower(Problem(model, nn.CrossEntropyLoss(), data()))
    assert torch.allclose(strict @ v, solutions(model, 0.1, v), rtol=0, atol=1e-10)
    hurried = inverse(GGN + 0.1 * Identity, maxiter=2).lower(Problem(model, nn.CrossEntropyLoss(), data()))
    assert torch.allclose(hurried @ v, solutions(model, 0.1, v), rtol=0, atol=1e-7)
    assert iterations(hurried) == 0  # two iterations are not enough, and the form needs none


def test_a_small_matrix_is_factorised_at_once(problem_of):
    small = problem_of("mlp")
    assert small.size < SMALL
    op = inverse(GGN + 0.1 * Identity).lower(small)
    _ = op @ small.gradient()
    assert iterations(op) == 0


def test_blocks_choose_for_themselves(model):
    problem = Problem(model, nn.CrossEntropyLoss(), data())
    op = inverse(block_diagonal(GGN, by="module") + 0.1 * Identity).lower(problem)
    v = vectors(op)
    x = op @ v
    assert ((block_diagonal(GGN, by="module") + 0.1 * Identity).lower(problem) @ x - v).norm() < 1e-8
    assert iterations(op) > 0  # the block of 1,220 parameters
    assert "the first ones are by cg" in op.explain()


def test_a_dense_form_is_made_for_many(model):
    X, y = data()
    many = Problem(model, nn.CrossEntropyLoss(), (X.repeat(3, 1), y.repeat(3)))
    op = inverse(GGN + 0.1 * Identity).lower(many)
    v = vectors(op)
    x = op @ v
    assert "dense: chosen" in op.explain()
    assert 0 < iterations(op) <= op.shape[0] // DENSE
    assert torch.allclose(x, solutions(model, 0.1, v), rtol=0, atol=1e-7)


def test_a_solve_that_is_kept_on_disk_goes_on(problem, model, tmp_path):
    op = inverse(GGN + 0.1 * Identity).lower(problem)
    v = vectors(op)
    first = op.solve(v, checkpoint=tmp_path / "solve.safetensors")
    again = op.solve(v, checkpoint=tmp_path / "solve.safetensors")
    for result in (first, again):
        assert torch.allclose(result.x, solutions(model, 0.1, v), rtol=0, atol=1e-7)


class Keyboard:
    """Presses Ctrl-C at one of the calls of a model."""

    calls, at = 0, 0


class Stopped(nn.Module):
    """Asks the keyboard."""

    def forward(self, x):
        Keyboard.calls += 1
        if Keyboard.calls == Keyboard.at:
            raise KeyboardInterrupt
        return x


def stoppable() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 20), Stopped(), nn.Tanh(), nn.Linear(20, CLASSES)).double()
    return Problem(model, nn.CrossEntropyLoss(), data(), cache=0)  # every product calls the model


def test_an_interrupted_solve_goes_on_by_conjugate_gradients_from_where_it_was(tmp_path):
    whole = inverse(GGN + 0.1 * Identity).lower(stoppable())
    v = vectors(whole)
    whole.prepare()
    Keyboard.calls = 0
    expected, taken = whole.solve(v), Keyboard.calls
    file = tmp_path / "solve.safetensors"
    op = inverse(GGN + 0.1 * Identity).lower(stoppable())
    op.prepare()
    Keyboard.calls, Keyboard.at = 0, taken - 3
    stopped = op.solve(v, checkpoint=file)
    Keyboard.at = 0
    assert stopped.partial and PRICE - int(stopped.iterations.sum()) < 16  # too few to begin another solve
    for _ in range(2):  # the second time it is over, and read from the file
        resumed = op.solve(v, checkpoint=file)
        assert torch.equal(resumed.iterations, expected.iterations)
        assert torch.equal(resumed.x, expected.x)


def test_a_solve_on_what_others_have_left_says_nothing_about_later_states(problem, model):
    easy, hard = (inverse(GGN + damping * Identity).lower(problem) for damping in (1.0, 0.04))
    v = vectors(easy)
    _ = easy @ v
    left = PRICE - iterations(easy)
    assert left >= 16
    _ = hard @ v
    assert iterations(hard) == 0  # what is left was not enough
    with torch.no_grad():
        model[0].weight += 0.001
    hard.refresh()
    _ = hard @ v
    assert left < iterations(hard) <= PRICE


def test_limits_of_one_inverse_say_nothing_about_another(problem):
    hurried = inverse(GGN + 0.1 * Identity, maxiter=2).lower(problem)
    v = vectors(hurried)
    _ = hurried @ v
    again = problem.with_data(data())
    op = inverse(GGN + 0.1 * Identity).lower(again)
    _ = op @ v
    assert iterations(op) > 0


def test_the_first_solves_do_not_ask_for_a_preconditioner(problem, model):
    """Making and applying it may take longer than the form, which needs none, and is in no price."""
    asked = []

    def precondition(r):
        asked.append(len(r))
        return r

    op = inverse(GGN + 0.1 * Identity).lower(problem, preconditioner=precondition)
    v = vectors(op)
    x = op @ v
    assert iterations(op) > 0 and not asked
    assert "the preconditioner is not needed" in op.explain()
    assert torch.allclose(x, solutions(model, 0.1, v), rtol=0, atol=1e-7)
