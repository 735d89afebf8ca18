"""Kept recordings: the same numbers as fresh ones, no model call in a product, released when let go."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import psutil
import pytest
import torch
from torch import nn

from curvalg import Identity, Problem, ProblemError, Term, block_diagonal, registry
from tests.support.agreement import SUMS, TERMS, close
from tests.support.third_party import CenteredTangent, MeanTangent, Skewed
from tests.support.zoo import ZOO, make

MODES = {
    "fresh, looped": {"cache": 0, "columns": "loop"},
    "fresh, batched": {"cache": 0, "columns": 3},
    "kept, looped": {"columns": "loop"},
    "kept, batched": {"columns": 2},
}


def expressions():
    build = registry.build
    local = {name: build(name) for name in TERMS[:5]}
    sums = {
        name: sum((c * build(n) for n, c in coefficients.items()), shift * Identity)
        for name, (coefficients, shift) in SUMS.items()
    }
    return {**local, **sums}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ZOO)
def test_exact_in_every_mode_three_times_with_one_column_and_many(mode, model, dense_of, problem_of, vectors):
    dense, problem = dense_of(model), problem_of(model, **MODES[mode])
    V = vectors(dense.D, 5)
    matrices = {name: dense.matrix(name) for name in TERMS[:5]}
    for name, (coefficients, shift) in SUMS.items():
        total = sum(c * dense.matrix(n) for n, c in coefficients.items())
        matrices[name] = total + shift * torch.eye(dense.D).double()
    for name, expr in expressions().items():
        op = expr.lower(problem)
        for _ in range(3):
            close(op @ V, matrices[name] @ V)
            close(op @ V[:, 0], matrices[name] @ V[:, 0])


@pytest.mark.parametrize("mode", MODES)
def test_third_party_terms_in_every_mode(mode, problem_of, vectors):
    reference = problem_of("mlp", cache=0, columns="loop")
    problem = problem_of("mlp", **MODES[mode])
    V = vectors(problem.size, 5)
    for expr in (Skewed(2.0), MeanTangent().T, CenteredTangent() - MeanTangent() + Skewed().T, CenteredTangent()):
        expected = expr.lower(reference) @ V
        for _ in range(3):
            close(expr.lower(problem) @ V, expected)


@pytest.mark.parametrize("model", ["mlp", "lstm", "attention_fused", "tied_embedding", "several_outputs"])
def test_no_model_call_once_kept(model, counted_model, vectors):
    problem, calls = counted_model(model, columns="loop")
    for expr in expressions().values():
        op = expr.lower(problem).prepare()
        V = vectors(problem.size)
        op @ V
        route = op.explain()
        before = calls()
        for _ in range(3):
            op @ V
        assert calls() == before or "by forward AD" in route


def test_another_damping_reuses_the_recording(counted_model):
    problem, calls = counted_model("mlp")
    build = registry.build
    v = torch.ones(problem.size).double()
    (build("hessian") + build("ggn")).lower(problem) @ v
    before = calls()
    (build("ggn") + build("hessian") + 0.3 * Identity).lower(problem) @ v
    assert calls() == before


def test_budget_keeps_what_fits_and_recomputes_the_rest(problem_of, dense_of, vectors):
    dense = dense_of("mlp")
    V = vectors(dense.D)
    whole = registry.build("hessian").lower(problem_of("mlp", columns="loop"))
    whole @ V
    needed = whole.problem.budget.used
    assert needed > 0
    for limit in (needed // 2, needed // 10, 1):
        problem = problem_of("mlp", cache=limit, columns="loop")
        op = registry.build("hessian").lower(problem)
        for _ in range(3):
            close(op @ V, dense.hessian @ V)
        assert problem.budget.used <= limit
        assert "of a budget of" in op.explain()


def test_the_least_recently_used_gives_way(problem_of, dense_of, vectors):
    dense = dense_of("mlp")
    V = vectors(dense.D)
    probe = problem_of("mlp", columns="loop")
    registry.build("hessian").lower(probe) @ V
    problem = problem_of("mlp", cache=int(1.5 * probe.budget.used), columns="loop")
    h = registry.build("hessian").lower(problem)
    u = (registry.build("hessian") + registry.build("covariance")).lower(problem)
    for _ in range(3):
        close(h @ V, dense.hessian @ V)
        close(u @ V, (dense.hessian + dense.covariance) @ V)
    assert problem.budget.used <= problem.budget.limit


def _graph_refs(problem):
    return [
        weakref.ref(t)
        for kept in problem._cached.values()
        for place in kept.keys("linearization")
        for recorded in kept.found(*place).batches.values()
        for t in recorded.graphs()
    ]


@pytest.mark.parametrize("expr", ["hessian", "ggn", "mixed"])
@pytest.mark.parametrize("how", ["close", "last reference"])
def test_no_graph_outlives_close_or_the_last_reference(expr, how, problem_of):
    build = registry.build
    mixed = build("hessian") + build("centered_covariance") + build("covariance")
    problem = problem_of("mlp")
    op = (mixed if expr == "mixed" else build(expr)).lower(problem)
    op @ torch.ones(op.shape[0]).double()
    refs = _graph_refs(problem)
    assert refs and all(r() is not None for r in refs)
    gc.disable()  # reference counting alone must do
    try:
        if how == "close":
            op.close()
        else:
            del op, problem
        assert all(r() is None for r in refs)
    finally:
        gc.enable()


def test_a_closed_operator_works_again(problem_of, dense_of, vectors):
    op = registry.build("hessian").lower(problem_of("mlp"))
    V = vectors(op.shape[0])
    op @ V
    op.close()
    close(op @ V, dense_of("mlp").hessian @ V)


def test_old_states_are_released_on_refresh(problem_of):
    case = make("mlp")
    op = registry.build("hessian").lower(problem_of(case))
    v = torch.ones(op.shape[0]).double()
    op @ v
    refs = _graph_refs(op.problem)
    with torch.no_grad():
        next(case.model.parameters()).add_(1.0)
    op.refresh() @ v
    gc.collect()
    assert all(r() is None for r in refs)


def test_a_hundred_rounds_leave_memory_flat():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 10))
    data = (torch.randn(400, 200), torch.randint(0, 10, (400,)))
    build = registry.build
    process = psutil.Process()

    def rounds(n):
        for _ in range(n):
            problem = Problem(model, nn.CrossEntropyLoss(), data)
            (build("hessian") + build("centered_covariance")).lower(problem) @ torch.ones(problem.size)
            build("ggn").lower(problem) @ torch.ones(problem.size)
        return process.memory_info().rss

    first = rounds(20)
    assert rounds(100) - first < 20 * 2**20  # each round records several MiB


def test_columns_are_batched_or_not_as_asked(problem_of):
    @dataclass(frozen=True)
    class Spy(Term):
        def cotangent_dot(self, batch, tangent):
            seen.append(torch._C._functorch.is_batchedtensor(tangent))
            return batch.loss_hvp(tangent)

    for columns, expected in (("loop", {False}), (4, {True})):
        seen: list[bool] = []
        op = Spy().lower(problem_of("mlp", columns=columns))
        op @ torch.ones(op.shape[0], 4).double()
        assert set(seen) == expected
    with pytest.raises(ProblemError, match="columns"):
        problem_of("mlp", columns=0)


@pytest.mark.parametrize("columns", ["auto", 4])
def test_a_term_that_cannot_be_batched_is_looped_and_reported(columns, problem_of, dense_of, vectors):
    @dataclass(frozen=True)
    class Stubborn(Term):
        def cotangent_dot(self, batch, tangent):
            if float(tangent.abs().sum().item()) < 0:
                raise AssertionError
            return batch.loss_hvp(tangent)

    V = vectors(dense_of("mlp").D, 5)
    op = Stubborn().lower(problem_of("mlp", columns=columns))
    for _ in range(2):
        close(op @ V, dense_of("mlp").ggn @ V)
    assert "columns one after the other" in op.explain()


class NoForward(torch.autograd.Function):
    """Squares; has no forward AD."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


@pytest.mark.parametrize("cache", [0, "auto"])
def test_an_operation_without_forward_ad_takes_the_double_backward(cache, problem_of, vectors, inside):
    inside(routes_after=1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return NoForward.apply(self.layer(x))

    case = make("mlp")
    case.model = Net().double()
    problem = problem_of(case, cache=cache)
    J = registry.build("jacobian").lower(problem).to_dense()
    B = registry.build("loss_hessian").lower(problem).to_dense()
    V = vectors(problem.size)
    op = registry.build("ggn").lower(problem)
    for v in V.T:
        close(op @ v, J.T @ B @ J @ v)
    assert "no forward AD" in op.explain()


@pytest.mark.parametrize(
    "model", ["mlp", "cnn", "lstm", "attention_softmax", "inplace_activation", "batchnorm_training"]
)
def test_many_products_stay_exact_whatever_route_is_tried(model, problem_of, dense_of, take_way, inside):
    """After many products a linearised program may be tried; on some models its second call is silently wrong."""
    take_way("ordinary")
    inside(amortised=32)
    dense, problem = dense_of(model), problem_of(model)
    op = registry.build("ggn").lower(problem)
    generator = torch.Generator().manual_seed(0)
    for _ in range(inside["amortised"] + 8):
        v = torch.randn(dense.D, generator=generator, dtype=torch.float64)
        close(op @ v, dense.ggn @ v)
    assert "linearised program" in op.explain()


def test_the_budget_can_be_changed_later_and_restrictions_share_it(problem_of, vectors):
    from curvalg import restrict

    problem = problem_of("mlp", columns="loop")
    whole, part = registry.build("hessian"), restrict(registry.build("hessian"), "2.*")
    V = vectors(problem.size)
    expected = whole.lower(problem) @ V
    part.lower(problem).to_dense()
    assert problem.budget.used > 0
    problem.cache = 0
    assert problem.budget.used == 0
    assert torch.allclose(whole.lower(problem) @ V, expected, atol=1e-13)
    part.lower(problem).to_dense()
    assert problem.budget.used == 0
    problem.cache = "auto"
    whole.lower(problem) @ V
    assert problem.budget.used > 0
    with pytest.raises(ProblemError, match="columns"):
        problem.columns = 0


def test_an_interrupted_first_product_over_a_shuffling_loader_leaves_nothing_behind(dense_of):
    from torch.utils.data import DataLoader, TensorDataset

    case = make("mlp")
    X, y = (torch.cat(parts) for parts in zip(*case.batches, strict=True))
    loader = DataLoader(TensorDataset(X, y), batch_size=2, shuffle=True)
    problem = Problem(case.model, case.loss, loader)
    stop = [True]

    @dataclass(frozen=True)
    class Interrupted(Term):
        def cotangent_dot(self, batch, tangent):
            if stop[0] and batch._start > 3:
                raise KeyboardInterrupt
            return batch.loss_hvp(tangent)

    op = Interrupted().lower(problem)
    v = torch.ones(problem.size).double()
    with pytest.raises(KeyboardInterrupt):
        op @ v
    stop[0] = False
    for _ in range(2):
        assert torch.allclose(op @ v, dense_of("mlp").ggn @ v, atol=1e-12)


def test_data_changed_in_place_under_a_recording_is_told(problem_of):
    from curvalg import StaleError

    case = make("mlp")
    op = registry.build("hessian").lower(problem_of(case, columns="loop"))
    v = torch.ones(op.shape[0]).double()
    op @ v
    case.batches[0][0].mul_(2.0)
    with pytest.raises(StaleError, match=r"data\[0\]\[0\]"):
        op @ v


@pytest.mark.parametrize("expr", ["hessian", "two stages"])
def test_fresh_products_hold_one_graph_at_a_time(expr, problem_of, inside):
    alive, most = [], [0]
    record = inside["record"]

    def watched(self):
        z, leaves, form = record(self)
        alive.append(weakref.ref(leaves[0]))
        most[0] = max(most[0], sum(r() is not None for r in alive))
        return z, leaves, form

    inside(record=watched)
    build = registry.build
    total = build("hessian") + build("centered_covariance")
    op = (build("hessian") if expr == "hessian" else total).lower(problem_of("mlp", cache=0)).prepare()
    alive.clear()
    most[0] = 0
    op @ torch.ones(op.shape[0]).double()
    assert len(alive) == 3
    assert most[0] == 1


def test_restrictions_share_the_budget(problem_of, vectors):
    problem = problem_of("mlp")
    part = problem.restricted(["0.*"])
    assert part.budget is problem.budget
    op = block_diagonal(registry.build("hessian"), by="module").lower(problem)
    op @ vectors(problem.size)
    assert problem.budget.used > 0
    problem.cache = 0
    op @ vectors(problem.size)
    assert problem.budget.used == 0
