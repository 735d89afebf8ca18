"""Recordings are kept where that pays: by a clock that a test sets, so that nothing depends on the machine."""

from __future__ import annotations

import pytest

from curvalg import block_diagonal, registry
from tests.support.agreement import close
from tests.support.inside import first_wins

DECIDED = 4
"""Products after which it is known."""


@pytest.fixture
def clock(inside):
    """(seconds of a recording, seconds of a product) -> every run takes one or the other."""

    def set_to(recording, product):
        def timed(run, device):
            result = run()
            return (product if hasattr(result, "shape") else recording), result

        inside(clock=timed)

    return set_to


def hessian(problem):
    return registry.build("hessian").lower(problem)


@pytest.mark.parametrize(
    ("seconds", "kept", "says"),
    [
        ((0.9, 1.0), True, "  kept: 1.9 times as fast as fresh"),
        ((0.01, 1.0), False, "  not kept: 1.01 times as fast as fresh"),
        ((0.12, 1.0), True, "  kept: 1.12 times as fast as fresh"),
    ],
)
@pytest.mark.parametrize("cache", ["auto", 2**24])
def test_only_what_pays_is_kept(seconds, kept, says, cache, problem_of, dense_of, vectors, clock):
    clock(*seconds)
    dense, problem = dense_of("mlp"), problem_of("mlp", cache=cache)
    op, v = hessian(problem), vectors(dense.D)[:, 0]
    for _ in range(DECIDED + 2):
        close(op @ v, dense.hessian @ v)
    assert says in op.explain()
    assert (problem.budget.used > 0) == kept
    close(op @ vectors(dense.D), dense.hessian @ vectors(dense.D))
    assert (problem.budget.used > 0) == kept


def test_what_was_chosen_holds_at_another_state_and_after_an_interruption(problem_of, vectors, clock, inside):
    inside(measure=first_wins)
    clock(0.01, 1.0)
    problem = problem_of("mlp")
    op, v = hessian(problem), vectors(problem.size)[:, 0]
    for _ in range(DECIDED):
        op @ v
    clock(9.0, 1.0)
    again = problem_of("mlp")
    again.measured.recalled = dict(problem.measured.choices)
    resumed = hessian(again)
    assert (resumed @ v).equal(op @ v)
    for each, on in ((resumed, again), (op.refresh(), problem)):
        each @ v
        assert on.budget.used == 0
        assert "not kept: no faster than fresh, as chosen before" in each.explain()


def test_what_is_not_kept_leaves_its_memory_to_others(problem_of, vectors, clock):
    clock(0.01, 1.0)
    problem = problem_of("cnn")
    first = registry.build("covariance").lower(problem)
    v = vectors(problem.size)[:, 0]
    first @ v
    before = problem.budget.used
    op = hessian(problem)
    for _ in range(DECIDED):
        op @ v
    assert problem.budget.used == before > 0


def test_batches_that_fit_are_judged_by_themselves(problem_of, vectors, clock):
    clock(0.01, 1.0)
    whole = problem_of("mlp")
    v = vectors(whole.size)[:, 0]
    hessian(whole) @ v
    problem = problem_of("mlp", cache=int(0.7 * whole.budget.used))
    op = hessian(problem)
    op @ v
    assert problem.budget.used > 0
    for _ in range(DECIDED):
        op @ v
    assert problem.budget.used == 0
    assert "not kept: 1.01 times as fast" in op.explain()


def test_what_blocks_have_in_common_is_kept(problem_of, vectors, clock):
    clock(0.01, 1.0)
    problem = problem_of("mlp")
    op, v = block_diagonal(registry.build("hessian")).lower(problem), vectors(problem.size)[:, 0]
    for _ in range(DECIDED + 2):
        op @ v
    assert problem.budget.used > 0


def test_products_with_several_columns_do_not_decide(problem_of, vectors, clock):
    clock(0.01, 1.0)
    problem = problem_of("mlp")
    op = hessian(problem)
    for _ in range(DECIDED + 2):
        op @ vectors(problem.size)
    assert problem.budget.used > 0


# -- first-order matrices: judged where the routes to tangents are compared ---------------------------------------------------


@pytest.mark.parametrize("name", ["ggn", "covariance"])
@pytest.mark.parametrize(
    ("recording", "kept", "says"),
    [(0.9, True, "  kept: 1.45 times as fast as fresh"), (0.02, False, "  not kept: 1.01 times as fast as fresh")],
)
def test_first_order_matrices_are_kept_where_it_pays(name, recording, kept, says, problem_of, vectors, clock, inside):
    clock(recording, 1.0)
    problem = problem_of("mlp")
    op, v = registry.build(name).lower(problem), vectors(problem.size)[:, 0]
    first = op @ v
    for _ in range(inside["routes_after"] + 2):
        close(op @ v, first)
    assert says in op.explain()
    assert (problem.budget.used > 0) == kept
    close(op @ v, first)


def test_first_order_recordings_that_others_share_stay(problem_of, vectors, clock, inside):
    """Products with the whole matrix judge recordings that its blocks hold as well: what does not pay is kept for these."""
    clock(0.01, 1.0)
    problem = problem_of("mlp", factored=False)
    whole = registry.build("ggn")
    blocks, v = block_diagonal(whole).lower(problem), vectors(problem.size)[:, 0]
    first = blocks @ v
    before, op = problem.budget.used, whole.lower(problem)
    for _ in range(inside["routes_after"] + 2):
        op @ v
    assert problem.budget.used >= before > 0
    assert "not kept" not in op.explain()
    assert (blocks @ v).equal(first)
    alone = problem_of("mlp", factored=False)
    op = whole.lower(alone)
    for _ in range(inside["routes_after"] + 2):
        op @ v
    assert alone.budget.used == 0
    assert "not kept" in op.explain()
