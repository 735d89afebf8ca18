"""Plans of operators: work beside torch's own counter, memory, fallbacks, and nothing that is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from curvalg import Identity, Problem, inverse, parse, restrict
from curvalg.errors import OptionError
from tests.support.sharded_models import made


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 5))


def problem(batches: int = 3, **options) -> Problem:
    model = options.pop("model", None) or net()
    data = [(torch.randn(16, 30), torch.randint(0, 5, (16,))) for _ in range(batches)]
    return Problem(model, options.pop("loss", nn.CrossEntropyLoss()), data, **options)


class Branching(nn.Module):
    """A network whose forward looks at a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(30, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if float(x.sum()) < 1e9 else self.layer(-x)


@pytest.mark.parametrize("cache", [0, "auto"])
@pytest.mark.parametrize("text", ["hessian", "ggn", "2*hessian + ggn", "hessian + centered_covariance"])
def test_work_is_what_torch_counts(text: str, cache: object) -> None:
    """Of a product after the first ones; checks of the first state are no part of it."""
    p = problem(cache=cache, factored=False, verify=False)
    op, v = parse(text).lower(p), torch.randn(p.size)
    op @ v
    with FlopCounterMode(display=False) as found:
        op @ v
    # The loss, which a plan leaves out, has no matrix products.
    assert op.plan().flops == pytest.approx(found.get_total_flops(), rel=0.02)


def test_work_in_forwards() -> None:
    """A dense stack whose layers are all equal: F = 2 W n, a fresh Hessian product up to 9 F, the first layer has less."""
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(30)))
    p = Problem(model, nn.MSELoss(), (torch.randn(8, 32), torch.randn(8, 32)), cache=0)
    forward = 2 * 30 * 32**2 * 8
    assert 8.5 * forward < parse("hessian").lower(p).plan().flops <= 9 * forward
    assert 5.5 * forward < parse("ggn").lower(p).plan().flops <= 6 * forward


def test_ranks_share_the_work() -> None:
    op = parse("hessian").lower(problem(8))
    assert op.plan(4).flops == op.plan(1).flops / 4
    assert op.plan(3).flops == op.plan(1).flops * 3 / 8  # the one with the most has three of eight batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    p = Problem(model, nn.CrossEntropyLoss(), (torch.randn(16, 30, dtype=dtype), torch.randint(0, 5, (16,))), cache=0)
    size, memory = p.size * dtype.itemsize, parse("hessian").lower(p).plan(steps=11).memory
    assert (memory.parameters, memory.snapshot, memory.basis) == (size, size, 11 * size)
    assert memory.whole_units == memory.buffers == 0


@pytest.mark.parametrize("text", ["hessian", "ggn", "hessian + centered_covariance"])
def test_recordings_are_as_large_as_those_that_are_kept(text: str) -> None:
    p = problem(factored=False)
    op, v = parse(text).lower(p), torch.randn(p.size)
    op @ v
    # The budget counts the weights with each batch: those of all layers but the first, which no gradient passes.
    weights = 3 * 4 * (40 * 20 + 20 * 5)
    assert op.plan().memory.recordings == pytest.approx(p.budget.used - weights, rel=0.02)


def test_recordings_are_kept_as_the_budget_decides() -> None:
    p = problem(factored=False)
    parse("ggn").lower(p) @ torch.randn(p.size)
    enough = p.budget.used
    for cache, batches in ((enough, 3), (enough - 1, 1)):
        plan = parse("ggn").lower(problem(factored=False, cache=cache)).plan()
        kept = parse("ggn").lower(problem(factored=False)).plan()
        assert (plan.flops == kept.flops) is (batches == 3)
        assert (plan.memory.recordings == kept.memory.recordings) is (batches == 3)


def test_units_of_parameters_in_parts() -> None:
    op = parse("hessian").lower(problem())
    memory = op.plan(4, shard="parameters").memory
    sizes = [30 * 40 + 40, 40 * 20 + 20, 20 * 5 + 5]
    assert memory.whole_units == 4 * (sizes[0] + sizes[1])
    parts = [-(-30 * 40 // 4) + 10, 200 + 5, 25 + 2]
    assert memory.parameters == memory.snapshot == 4 * sum(parts)
    assert memory.buffers == 4 * 4 * parts[0]


def test_parameters_are_cut_where_memory_is_short() -> None:
    op = parse("hessian").lower(problem(cache=0))
    needed = op.plan(64, steps=50).memory.total
    assert op.plan(64, needed, steps=50).shard == "data"
    plan = op.plan(64, needed - 1, steps=50)
    assert plan.shard == "parameters" and plan.traffic["gather"].calls > 0
    alone = op.plan(1, needed - 1, steps=50)
    assert alone.fits is False and "ranks" in str(alone.cure)


def test_a_sum_is_one_exchange_and_a_product_two() -> None:
    p = problem(loss=nn.CrossEntropyLoss())
    for text, calls in (
        ("2*hessian + ggn + 0.1*identity", 1),
        ("hessian @ ggn", 2),
        ("kfac", 0),
        ("block_diagonal(hessian)", 1),
    ):
        assert parse(text).lower(p).plan(2).traffic["all-reduce"].calls == calls, text


def test_an_inverse_is_planned_by_its_iterations() -> None:
    p = problem(cache=0)
    matrix = parse("ggn") + 0.1 * Identity
    plan = inverse(matrix, solver="cg").lower(p).plan(2)
    assert plan.flops == matrix.lower(p).plan(2).flops
    assert any("one iteration of cg" in note for note in plan.notes)


def test_matrices_that_are_made_once_say_so() -> None:
    plan = parse("kfac").lower(problem()).plan(4)
    assert plan.flops == 0 and any("pass over the data" in note for note in plan.notes)


def test_some_of_the_parameters() -> None:
    p = problem(cache=0)
    plan = restrict(parse("hessian"), "0.*").lower(p).plan(2, steps=10)
    assert plan.flops < parse("hessian").lower(p).plan(2).flops


def test_a_model_that_branches_on_numbers_is_counted_by_weights() -> None:
    p = problem(model=Branching(), cache=0)
    plan = parse("hessian").lower(p).plan(2)
    weights = 30 * 5 + 5
    assert plan.flops == 9 * 2 * weights * 16 * 2  # two batches of 16 on the first rank
    assert plan.memory.recordings == 0
    assert any("2 W" in note and "recordings unknown" in note for note in plan.notes)
    assert parse("hessian").lower(p).plan(2, shard="parameters").traffic["gather"].calls == 2 * 5


def test_a_function_has_no_parts() -> None:
    w = {"w": torch.randn(30, 5)}
    data = (torch.randn(8, 30), torch.randint(0, 5, (8,)))
    p = Problem(lambda params, x: x @ params["w"], nn.CrossEntropyLoss(), data, params=w)
    op = parse("hessian").lower(p)
    assert op.plan(2, 10, shard="data").fits is False
    assert "more ranks do not help" in str(op.plan(2, 10).cure)
    with pytest.raises(OptionError, match=r"nn\.Module"):
        op.plan(2, shard="parameters")


def test_a_language_model() -> None:
    model = made("tied")
    data = [(torch.randint(0, 7, (9, 5)), torch.randint(0, 7, (9, 5)))]
    plan = parse("ggn").lower(Problem(model, nn.CrossEntropyLoss(), data)).plan(4, shard="parameters")
    assert plan.flops > 0 and plan.memory.recordings > 0


def test_nothing_is_computed_and_nothing_is_touched() -> None:
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Linear(20, 5)).eval()
    p = problem(model=model)
    op = parse("hessian").lower(p)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    draws = torch.get_rng_state()
    handle = model.register_forward_hook(lambda module, given, z: calls.append(type(z) is torch.Tensor))
    op.refresh()
    calls.clear()
    op.plan(8, "8GB")
    op.plan(8, shard="parameters")
    handle.remove()
    assert calls and not any(calls)  # tensors without numbers alone
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())
    op.refresh() @ torch.randn(p.size)


@pytest.mark.parametrize("ranks", [0, -1, "4", 2.0, None])
def test_ranks_that_are_none(ranks: object) -> None:
    with pytest.raises(OptionError, match="ranks="):
        parse("hessian").lower(problem()).plan(ranks)  # type: ignore[arg-type]
