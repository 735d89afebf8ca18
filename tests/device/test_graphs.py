"""Products captured as CUDA graphs give the eager numbers, and never read memory that somebody else has taken."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from curvalg import Identity, Problem, StaleError, Term, VectorError, inverse, registry, restrict
from curvalg.errors import ProblemError
from tests.support.inside import first_wins, last_wins

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU, and none is simulated")
build = registry.build
EXPRESSIONS = {
    "hessian": build("hessian"),
    "damped ggn": build("ggn") + 1e-3 * Identity,
    "sum": build("hessian") + 2 * build("covariance"),
    "two stages": build("centered_covariance"),
    "totals": build("ggn_class"),
    "kfac": build("kfac"),
    "inverse of kfac": inverse(build("kfac") + 0.1 * Identity),
    "inverse by the Gram matrix": inverse(build("ggn") + 0.1 * Identity, solver="gram"),
    "inverse by a dense matrix": inverse(build("ggn") + 0.1 * Identity, solver="dense"),
    "conjugate gradients": inverse(build("ggn") + 0.1 * Identity, solver="cg"),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double().cuda()


def problem(model=None, **options):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(20, 6, generator=generator, dtype=torch.float64).cuda()
    y = torch.randint(0, 3, (20,), generator=generator).cuda()
    data = [(X[:12], y[:12]), (X[12:], y[12:])]
    return Problem(model or net(), nn.CrossEntropyLoss(), data, **{"graphs": True, **options})


def draw(p, *columns):
    return torch.randn(p.size, *columns, dtype=torch.float64, device="cuda")


def close(a, b):
    return bool((a - b).norm() <= 1e-12 * b.norm())


def captured(op):
    return [line for line in op.explain().splitlines() if "a CUDA graph is replayed" in line]


def replaying(p=None):
    """An operator whose products are replayed by now, and the eager one."""
    p = p or problem()
    op, eager = build("hessian").lower(p), build("hessian").lower(problem(graphs=False))
    for _ in range(5):
        op @ draw(p)
    assert captured(op)
    return op, eager


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_replayed_products_are_the_eager_ones(name):
    p = problem()
    op, eager = (EXPRESSIONS[name].lower(q) for q in (p, problem(graphs=False)))
    iterative = name == "conjugate gradients"  # whose products are replayed, and whose iterations look at residuals
    for width in [(), (3,), (), (5,)] * (1 if iterative else 5):
        v = draw(p, *width)
        assert close(op @ v, eager @ v)
    assert len(captured(op)) >= (1 if iterative else 3)


def test_results_and_operands_have_memory_of_their_own():
    op, eager = replaying()
    v, w = draw(op.problem), draw(op.problem)
    before, first = v.clone(), op @ v
    second = op @ w
    assert close(first, eager @ v)
    assert close(second, eager @ w)
    assert torch.equal(v, before)


def test_the_last_solve_is_of_the_last_product():
    p = problem()
    op, eager = (EXPRESSIONS["inverse of kfac"].lower(q) for q in (p, problem(graphs=False)))
    for width in [(), (), (), (3,), (3,), (3,), (), (3,), ()]:
        v = draw(p, *width)
        assert close(op @ v, eager @ v)
        for found, expected in ((op.last_solve.x, eager.last_solve.x), (op.last_solve.x.reshape(v.shape), eager @ v)):
            assert close(found, expected)
    assert len(captured(op)) == 2


def test_without_graphs_nothing_is_captured():
    p = problem(graphs=False)
    op = build("hessian").lower(p)
    for _ in range(6):
        op @ draw(p)
    assert "CUDA graph" not in op.explain()


def test_another_option_is_refused():
    with pytest.raises(ProblemError, match="graphs is one of"):
        problem(graphs="always")


@pytest.mark.parametrize(("winner", "count"), [(first_wins, 0), (last_wins, 1)])
def test_auto_takes_what_is_faster(winner, count, inside):
    inside(measure=winner)
    p = problem(graphs="auto")
    op = build("hessian").lower(p)
    for _ in range(6):
        op @ draw(p)
    assert len(captured(op)) == count
    assert count or "no CUDA graph, which is not faster" in op.explain()


def test_a_new_state_is_not_replayed_from_the_old_one():
    model = net()
    op, _ = replaying(problem(model))
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(StaleError):
        op @ draw(op.problem)
    op.refresh()
    expected = build("hessian").lower(problem(model, graphs=False))
    for _ in range(6):
        v = draw(op.problem)
        assert close(op @ v, expected @ v)


def test_what_a_graph_reads_may_be_dropped_and_made_again():
    op, eager = replaying()
    op._plan.release(op.snapshot)
    for _ in range(6):
        v = draw(op.problem)
        assert close(op @ v, eager @ v)
    assert captured(op)


def test_memory_of_a_graph_is_released_with_what_it_reads():
    op, eager = replaying()
    kept = op.problem.budget.used
    op.problem.cache = kept // 4
    assert op.problem.budget.used <= kept // 4
    assert not captured(op)
    v = draw(op.problem)
    assert close(op @ v, eager @ v)


def test_graphs_count_in_the_budget():
    p = problem()
    op = build("hessian").lower(p)
    op @ draw(p)
    before = p.budget.used
    for _ in range(5):
        op @ draw(p)
    assert captured(op)
    assert p.budget.used > before


def test_a_closed_problem_holds_no_graph():
    op, eager = replaying()
    graph = weakref.ref(next(iter(op._repeated._products(op.snapshot).values())))
    op.close()
    gc.collect()
    assert graph() is None
    v = draw(op.problem)
    assert close(op @ v, eager @ v)


@dataclass(frozen=True)
class Waiting(Term):
    """A term that looks at a number, for which the host has to wait."""

    api: ClassVar[int] = 1

    def cotangent_dot(self, batch, tangent):
        return tangent * (1.0 if float(batch.output.sum()) < 1e9 else 2.0)


def test_what_waits_for_the_device_goes_on_eagerly():
    p = problem()
    op, eager = Waiting().lower(p), Waiting().lower(problem(graphs=False))
    for _ in range(6):
        v = draw(p)
        assert close(op @ v, eager @ v)
    assert not captured(op)
    assert "no CUDA graph, CUDA error: operation not permitted when stream is capturing" in op.explain()


def test_a_graph_that_gives_other_numbers_is_not_used(inside):
    right = inside["replay"]
    inside(replay=lambda self, x: 1.001 * right(self, x))
    p = problem()
    op, eager = build("hessian").lower(p), build("hessian").lower(problem(graphs=False))
    for _ in range(6):
        v = draw(p)
        assert close(op @ v, eager @ v)
    assert "no CUDA graph, whose products differ from eager ones" in op.explain()


def test_an_operand_that_is_not_finite_spoils_no_graph():
    p = problem()
    op = build("hessian").lower(p)
    for i in range(8):
        v = draw(p)
        if i == 2:
            v[0] = torch.nan
            with pytest.raises(VectorError, match="the operand has NaN"):
                op @ v
        else:
            op @ v
    assert captured(op)


@pytest.mark.parametrize("solver", ["minres", "cg", "dense"])
def test_an_operand_that_is_not_finite_is_blamed_for_itself(solver):
    p = problem(graphs=False)
    op = inverse(build("ggn") + 0.1 * Identity, solver=solver, rtol=1e-9).lower(p)
    v = draw(p)
    op @ v
    v[0] = torch.nan
    with pytest.raises(VectorError, match="the operand has NaN"):
        op @ v


@pytest.mark.parametrize("params", ["*", "0.*"])
def test_a_problem_with_restrictions_closes(params):
    p = problem()
    op = restrict(build("ggn"), params).lower(p)
    v = torch.ones(op.shape[1], dtype=torch.float64, device="cuda")
    first = op @ v
    p.close()
    assert close(op @ v, first)
