"""Whole matrices of few output directions: by recorded graphs, from layer inputs and deltas, or from V multiplied out."""

from __future__ import annotations

import time

import pytest
import torch

from curvalg import Identity, ProblemError, registry
from tests.support.agreement import close
from tests.support.inside import first_wins
from tests.support.zoo import ZOO

PATIENCE = 5
"""Columns before another way is tried, where it is not tried at once."""
WAYS = ["ordinary", "factored", "multiplied out"]
SUMS = {
    "ggn": (lambda b: b("ggn"), lambda d: d.ggn),
    "covariance": (lambda b: b("covariance"), lambda d: d.covariance),
    "centred": (lambda b: b("centered_covariance"), lambda d: d.centered_covariance),
    "signed sum": (
        lambda b: 2 * b("ggn") - b("centered_covariance") / 3 + b("covariance") + 0.5 * Identity,
        lambda d: 2 * d.ggn - d.centered_covariance / 3 + d.covariance + 0.5 * torch.eye(d.D).double(),
    ),
}


@pytest.fixture(autouse=True)
def _at_once(inside):
    inside(patience=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ZOO)
def test_every_way_gives_the_dense_matrix(model, way, problem_of, dense_of, vectors, take_way):
    take_way(way)
    dense, problem = dense_of(model), problem_of(model)
    V = vectors(dense.D, 5)
    for make, reference in SUMS.values():
        op = make(registry.build).lower(problem)
        for _ in range(2):
            close(op @ V, reference(dense) @ V)
            close(op @ V[:, 0], reference(dense) @ V[:, 0])


@pytest.mark.parametrize("way", WAYS[1:])
def test_the_way_is_told_and_what_it_keeps(way, problem_of, vectors, take_way):
    take_way(way)
    op = registry.build("covariance").lower(problem_of("mlp"))
    op @ vectors(op.shape[1])[:, 0]
    report = op.explain()
    assert f"covariance, {way}" in report
    assert "measured, one column: ordinary" in report
    assert "recorded" not in report
    op @ vectors(op.shape[1])
    assert "measured, several columns: ordinary" in op.explain()


def test_the_first_columns_take_the_ordinary_way(problem_of, vectors, inside, take_way):
    inside(patience=PATIENCE)
    take_way("factored")
    op = registry.build("ggn").lower(problem_of("mlp"))
    v = vectors(op.shape[1])[:, 0]
    for _ in range(PATIENCE):
        op @ v
    assert "factored" not in op.explain()
    op @ v
    assert "ggn, factored" in op.explain()


def test_no_model_call_once_chosen(counted_model, vectors, take_way):
    for way in WAYS[1:]:
        take_way(way)
        problem, calls = counted_model("cnn")
        op = registry.build("covariance").lower(problem)
        v = vectors(problem.size)[:, 0]
        op @ v
        before = calls()
        op @ v
        op @ vectors(problem.size)
        assert way == "multiplied out" or calls() > before  # the first product with several columns measures again
        before = calls()
        op @ vectors(problem.size)
        assert calls() == before


def test_a_way_that_differs_is_not_taken(problem_of, dense_of, vectors, inside, take_way):
    take_way("factored")
    right = inside["factored_product"]
    inside(factored_product=lambda self, snapshot, x: right(self, snapshot, x) * (1 + 1e-6))
    dense = dense_of("mlp")
    op = registry.build("ggn").lower(problem_of("mlp"))
    V = vectors(dense.D)
    close(op @ V, dense.ggn @ V)
    close(op @ V, dense.ggn @ V)
    assert "not factored: its product differs from the ordinary one" in op.explain()


def test_a_budget_that_does_not_suffice_is_told_and_may_grow(problem_of, dense_of, vectors, take_way, inside):
    take_way("factored")
    inside(small_factor=0)  # so that one of the ways stays impossible
    dense, problem = dense_of("cnn"), problem_of("cnn", cache=2000)
    op = registry.build("covariance").lower(problem)
    V = vectors(dense.D)
    for _ in range(2):
        close(op @ V, dense.covariance @ V)
        assert problem.budget.used <= 2000
    assert "not factored: layer inputs and deltas do not fit the budget" in op.explain()
    problem.cache = 2**24
    measured = []
    measure = inside["measure"]
    inside(measure=lambda candidates, *options: measured.append(len(candidates)) or measure(candidates, *options))
    for _ in range(3):
        close(op @ V, dense.covariance @ V)
    assert "covariance, factored" in op.explain()
    assert len(measured) == 1  # not again at every product
    problem.cache = 2000
    close(op @ V, dense.covariance @ V)
    assert problem.budget.used <= 2000


def test_nothing_of_the_loser_is_kept(problem_of, vectors, take_way, inside):
    for way in WAYS:
        take_way(way)
        problem = problem_of("mlp")
        op = registry.build("covariance").lower(problem)
        for width in (1, 3):
            op @ vectors(problem.size, width)
        kept = problem.cached(op.snapshot)
        recordings = [kept.found(*place) for place in kept.keys("linearization")]
        (factor,) = (kept.found(*place) for place in kept.keys("factor"))
        assert any(r.batches for r in recordings) == (way == "ordinary")
        assert factor.complete == (way != "ordinary")
        assert (factor._matrix is not None) == (way == "multiplied out")
        held = sum(r.nbytes for r in recordings) + factor.nbytes
        assert held == problem.budget.used


def test_many_output_directions_are_told(problem_of, vectors, inside):
    inside(most_columns=1)
    op = registry.build("ggn").lower(problem_of("mlp"))
    op @ vectors(op.shape[1])
    assert "output directions for each row of the data, more than 1" in op.explain()


def test_a_resumed_run_takes_what_was_chosen(problem_of, vectors, inside):
    first = problem_of("mlp")
    op = registry.build("ggn").lower(first)
    expected = op @ vectors(first.size)
    for way in WAYS:
        again = problem_of("mlp")
        choices = first.measured.choices
        again.measured.recalled = {name: way if name.startswith("way") else choices[name] for name in choices}
        assert any(name.startswith("way") for name in again.measured.recalled)
        inside(measure=lambda *_: pytest.fail("measured again"))
        op = registry.build("ggn").lower(again)
        close(op @ vectors(first.size), expected)
        assert f"several columns: {way}, as chosen before" in op.explain()


@pytest.mark.parametrize(("seconds", "order"), [(1.0, [1, 1, 2, 2]), (0.001, 2 * [1, 1, 1, 2, 2, 2])])
def test_runs_are_raced_in_turns_that_begin_untimed(seconds, order, monkeypatch, inside):
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run(number):
        again = bool(calls) and calls[-1] == number
        calls.append(number)
        now[0] += number * seconds + (0.0 if again else 10 * seconds)  # the first of a turn makes something again

    runs = {number: inside["candidate"](lambda number=number: run(number)) for number in (1, 2)}
    measured = inside["measure"](runs, 2, lambda seconds: False, torch.device("cpu"))
    assert measured == pytest.approx({1: seconds, 2: 2 * seconds})
    assert calls == order


@pytest.mark.parametrize(
    ("seconds", "within", "timed"),
    [
        ({1: 1e-3, 2: 1.0, 3: 1e-4}, 3.0, {1, 2}),  # what has taken so long leaves nothing for the third
        ({1: 1e-3, 2: 2.5e-3, 3: 2e-3}, 3.0, {1, 2}),
        ({1: 1e-3, 2: 1e-4, 3: 1e-4}, 3.0, {1, 2, 3}),
    ],
)
def test_a_race_takes_a_few_runs_of_its_reference(seconds, within, timed, monkeypatch, inside):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run(number):
        now[0] += seconds[number]

    runs = {n: inside["candidate"](lambda n=n: run(n), warm=True, rounds=1) for n in seconds}
    assert set(inside["measure"](runs, 1, lambda seconds: False, torch.device("cpu"), within)) == timed
    assert now[0] <= within * seconds[1] + max(seconds.values())


class Clock:
    """A clock by which one backward pass takes as long as a table says for its number of columns."""

    def __init__(self, inside, seconds):
        self.widths = []

        def timed(run, device):
            before = len(self.widths)
            result = run()
            return seconds[self.widths[before]], result

        original = inside["multiply_recording"]

        def multiply(recorded, rows, chunk):
            self.widths.append(rows.shape[0])
            return original(recorded, rows, chunk)

        inside(multiply_recording=multiply)
        inside(clock=timed)


@pytest.mark.parametrize(
    ("seconds", "columns", "chosen"),
    [
        ({1: 0.001, 4: 0.002, 16: 0.004}, 16, 16),
        ({1: 0.001, 4: 0.002, 16: 0.04}, 16, 4),
        ({1: 0.001, 4: 0.02, 16: 0.004}, 16, 16),  # a small batch may lose where a large one wins
        ({1: 1.0, 4: 8.0}, 16, 1),  # where it is work, wider ones are not measured
        ({1: 0.001, 2: 0.001}, 3, 2),
        ({1: 0.001, 4: 0.001}, 5, 4),
        ({1: 0.001, 16: 0.001, 64: 0.01}, 70, 16),
    ],
)
def test_the_number_of_columns_at_a_time_is_the_fastest(seconds, columns, chosen, problem_of, vectors, inside):
    op = registry.build("hessian").lower(problem_of("mlp"))
    expected = registry.build("hessian").lower(problem_of("mlp", columns="loop")) @ vectors(op.shape[1], columns)
    op @ vectors(op.shape[1], 1)
    Clock(inside, seconds)
    close(op @ vectors(op.shape[1], columns), expected)
    assert f"columns on {chosen} at a time" in op.explain()


def test_columns_are_measured_anew_for_wider_operands(problem_of, vectors):
    op = registry.build("hessian").lower(problem_of("mlp"))
    for columns in (2, 3, 16, 20):
        op @ vectors(op.shape[1], columns)
    report = op.explain()
    assert "from 2 columns on" in report and "from 16 columns on" in report and report.count(" at a time") == 2


def test_the_user_may_insist_or_forbid(problem_of, dense_of, vectors, inside):
    inside(patience=PATIENCE)
    inside(measure=first_wins)  # the ordinary way, wherever it may be taken
    dense = dense_of("mlp")
    v, A = vectors(dense.D)[:, 0], dense.ggn
    for asked, told in ((True, "ggn, factored"), (False, "sweep: ggn"), ("auto", "sweep: ggn")):
        op = registry.build("ggn").lower(problem_of("mlp", factored=asked))
        close(op @ v, A @ v)
        assert told in op.explain()
        for _ in range(PATIENCE + 1):
            op @ v
        assert told in op.explain()
        assert ("measured" in op.explain()) == (asked is not False)
    hessian = registry.build("hessian").lower(problem_of("mlp", factored=True))
    close(hessian @ v, dense.hessian @ v)
    many = registry.build("ggn").lower(problem_of("mlp", factored=True, cache=1))
    close(many @ v, A @ v)
    assert "do not fit the budget" in many.explain()
    with pytest.raises(ProblemError, match="factored is one of"):
        problem_of("mlp", factored="yes")


def test_another_state_of_the_model_is_not_measured_again(problem_of, vectors, inside):
    """A training step changes the matrix, not what is fast."""
    inside(amortised=4)
    problem = problem_of("mlp")
    ops = [registry.build(name).lower(problem) for name in ("ggn", "hessian")]
    for op in ops:
        for width in (1, 3, 1):
            op @ vectors(problem.size, width)
    with torch.no_grad():
        next(iter(problem.model.chosen.values())).mul_(1.1)
    fresh = problem_of("mlp", cache=0, columns="loop")
    for p, q in zip(problem.model.chosen.values(), fresh.model.chosen.values(), strict=True):
        q.data.copy_(p)
    expected = [op.expr.lower(fresh) @ vectors(problem.size, 3) for op in ops]
    inside(measure=lambda *_: pytest.fail("measured again"))
    for op, product in zip(ops, expected, strict=True):
        op.refresh()
        for _ in range(4):
            close(op @ vectors(problem.size, 3), product)
            close(op @ vectors(problem.size, 3)[:, 0], product[:, 0])
    assert "as chosen before" in ops[0].explain()


def test_a_way_that_was_chosen_before_is_compared_at_another_state_too(problem_of, dense_of, vectors, inside, take_way):
    take_way("factored")
    dense, problem = dense_of("mlp"), problem_of("mlp")
    op = registry.build("ggn").lower(problem)
    V = vectors(dense.D)
    close(op @ V, dense.ggn @ V)
    right = inside["factored_product"]
    inside(factored_product=lambda self, snapshot, x: right(self, snapshot, x) * (1 + 1e-6))
    op.close()  # what is kept is made again, as at another state
    close(op @ V, dense.ggn @ V)
    assert "not factored: its product differs from the ordinary one" in op.explain()
