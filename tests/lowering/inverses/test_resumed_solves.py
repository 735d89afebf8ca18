"""Iterative solves that are interrupted, written to a file and resumed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import CheckpointError, Identity, Problem, block_diagonal, inverse, registry
from tests.support.inside import first_wins

GGN = registry.build("ggn")
CASES = {
    "cg": inverse(GGN + 1e-3 * Identity, solver="cg", rtol=1e-9),
    "preconditioned": inverse(
        GGN + 1e-3 * Identity, solver="cg", rtol=1e-9, preconditioner=registry.build("kfac") + 1e-2 * Identity
    ),
    "minres": inverse(registry.build("hessian") + 1e-2 * Identity, solver="minres", rtol=1e-9),
    "blocks": inverse(block_diagonal({"0.*": registry.build("hessian") + Identity, "2.*": GGN + 1e-3 * Identity})),
}


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    return Problem(net, nn.CrossEntropyLoss(), (torch.randn(50, 10).double(), torch.arange(50) % 5))


@pytest.fixture(autouse=True)
def _no_clock(inside):
    """Every run chooses the same routes; that choices are recalled has tests of its own."""
    inside(measure=first_wins)
    inside(amortised=10**9)
    inside(patience=10**9)
    inside(overhead=0.0)


def right_sides(p):
    """Four, of which one needs no iteration and one only a few: what remains lies in memory in another way then."""
    b = torch.randn(p.size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    b[:, 1] = 0
    b[:, 2] = (GGN + 1e-3 * Identity).lower(p) @ p.gradient()
    return b


class Counter:
    """Interrupts a product, once, and counts them."""

    def __init__(self, inside):
        self.left, self.count, product = 0, 0, inside["sweep"]

        def counted(linearization, *args):
            self.count += 1
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return product(linearization, *args)

        inside(sweep=counted)


@pytest.mark.parametrize("at", [3, 17])
@pytest.mark.parametrize("name", ["cg", "preconditioned", "minres"])
def test_a_resumed_solve_gives_the_same_bits(name, at, tmp_path, inside):
    p, counter = problem(), Counter(inside)
    op, b, path = CASES[name].lower(p), right_sides(p), tmp_path / "run.safetensors"
    whole = op.solve(b)
    products, counter.count = counter.count, 0
    counter.left = at
    partial = CASES[name].lower(problem()).solve(b, checkpoint=path)
    assert partial.partial and not partial.ok and "interrupted" in partial.reason and path.exists()
    counter.count = 0
    resumed = CASES[name].lower(problem()).solve(b, checkpoint=path)
    assert not resumed.partial and resumed.ok
    for left, right in ((resumed.x, whole.x), (resumed.residual, whole.residual), (resumed.history, whole.history)):
        assert torch.equal(left, right)
    assert torch.equal(resumed.iterations, whole.iterations) and resumed.reason == whole.reason
    assert counter.count < products - at + 8  # the preconditioner and the last iteration are made again
    counter.count = 0
    again = CASES[name].lower(problem()).solve(b, checkpoint=path)
    assert torch.equal(again.x, whole.x) and counter.count <= 4


def test_blocks_go_on_in_the_block_that_was_interrupted(tmp_path, inside):
    p = problem()
    inside(dense_limit=10)
    counter = Counter(inside)
    op, b, path = CASES["blocks"].lower(p), right_sides(p), tmp_path / "run.safetensors"
    whole = op.solve(b)
    assert "cg" in op.explain() or "minres" in op.explain()
    for at in (4, counter.count - 4):
        path.unlink(missing_ok=True)
        counter.left = at
        assert op.solve(b, checkpoint=path).partial
        resumed = op.solve(b, checkpoint=path)
        assert resumed.ok and torch.equal(resumed.x, whole.x)


def test_without_a_file_an_interruption_gives_the_best_iterates(inside):
    p, counter = problem(), Counter(inside)
    op, b = CASES["cg"].lower(p), right_sides(p)
    counter.left = 20
    result = op.solve(b)
    assert result.partial and set(result.reason) == {"interrupted", "converged"}
    A = (GGN + 1e-3 * Identity).lower(p)
    assert torch.allclose((b - A @ result.x).norm(dim=0), result.residual)
    assert (result.residual <= b.norm(dim=0)).all() and float(result.residual[0]) < 0.9 * b[:, 0].norm()


def test_an_interrupted_product_is_an_interruption(inside):
    p, counter = problem(), Counter(inside)
    counter.left = 5
    with pytest.raises(KeyboardInterrupt):
        CASES["cg"].lower(p) @ right_sides(p)


def test_the_file_of_another_solve_is_refused(tmp_path):
    p, path = problem(), tmp_path / "run.safetensors"
    b = right_sides(p)
    CASES["cg"].lower(p).solve(b, checkpoint=path)
    with pytest.raises(CheckpointError, match="option b differs"):
        CASES["cg"].lower(p).solve(2 * b, checkpoint=path)
    with pytest.raises(CheckpointError, match="expression differs"):
        inverse(GGN + 1e-2 * Identity, solver="cg", rtol=1e-9).lower(p).solve(b, checkpoint=path)


def test_a_direct_solve_writes_no_file(tmp_path):
    p, path = problem(), tmp_path / "run.safetensors"
    assert inverse(GGN + Identity, solver="dense").lower(p).solve(right_sides(p), checkpoint=path).ok
    assert not path.exists()


def test_progress(capsys, tmp_path, inside):
    inside(file_due=lambda _: True)
    p = problem()
    CASES["cg"].lower(p).solve(right_sides(p), progress=True, checkpoint=tmp_path / "run.safetensors")
    shown = capsys.readouterr().err
    assert "solve with cg" in shown and "iteration" in shown and "residual" in shown


@pytest.mark.parametrize("at", [2, 5, 11])
def test_the_way_of_a_product_is_the_same_after_an_interruption(at, tmp_path, inside, take_way):
    """Before another way is tried, at the product that tries it, and after it."""
    inside(patience=7)
    take_way("factored")
    p, left = problem(), [0]
    b, path, apply = right_sides(p)[:, :1], tmp_path / "run.safetensors", inside["low_rank_product"]

    def counted(plan, *args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return apply(plan, *args)

    inside(low_rank_product=counted)
    p = problem()
    whole = CASES["cg"].lower(p).solve(b)
    left[0] = at
    assert CASES["cg"].lower(problem()).solve(b, checkpoint=path).partial
    take_way("ordinary")  # what was chosen is recalled; what was not is chosen now, as it would be by another clock
    if at < 10:
        take_way("factored")
    resumed = CASES["cg"].lower(problem()).solve(b, checkpoint=path)
    assert torch.equal(resumed.x, whole.x) and torch.equal(resumed.history, whole.history)
