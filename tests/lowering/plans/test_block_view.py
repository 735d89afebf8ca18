"""op.structure gives the arrays that make the matrix, and bound expressions are of no state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import (
    ExpressionError,
    Identity,
    Problem,
    ProblemError,
    StaleError,
    block_diagonal,
    diagonal_part,
    inverse,
    nystrom,
    registry,
    restrict,
    sqrt,
)

build = registry.build


def small(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).double()
    return Problem(net, nn.CrossEntropyLoss(), (torch.randn(12, 2, 4, 4).double(), torch.randint(3, (12,))))


EXPRESSIONS = {
    "kfac": lambda: build("kfac"),
    "damped kfac": lambda: 2 * build("kfac") + 0.1 * Identity,
    "inverse of kfac": lambda: inverse(build("kfac") + 0.1 * Identity),
    "kfac by weight and bias": lambda: build("kfac", joint=False),
    "ekfac": lambda: 2 * build("ekfac") + 0.1 * Identity,
    "inverse of ekfac": lambda: inverse(build("ekfac") + 0.1 * Identity),
    "diagonal": lambda: build("ggn_diagonal") - 0.5 * Identity,
    "inverse of a diagonal": lambda: inverse(build("ggn_diagonal") + Identity),
    "diagonal part": lambda: diagonal_part(build("hessian")),
    "root": lambda: sqrt(build("kfac")),
    "blocks of products": lambda: block_diagonal(build("ggn")),
    "inverse of blocks": lambda: inverse(block_diagonal(build("ggn"), by="module") + Identity),
    "low rank": lambda: nystrom(build("ggn"), 3) + Identity,
    "inverse of low rank": lambda: inverse(nystrom(build("ggn"), 3) + 1e-6 * Identity),
    "sum of two forms": lambda: build("kfac") + build("ggn_diagonal"),
    "restricted": lambda: restrict(build("kfac"), "4.*"),
    "restricted products": lambda: restrict(build("ggn"), "4.*") + Identity,
    "product": lambda: build("kfac") @ build("kfac"),
    "product of terms": lambda: build("hessian") @ build("ggn"),
    "hessian": lambda: build("hessian"),
    "inverse through the Gram matrix": lambda: inverse(build("covariance") + 0.1 * Identity),
    "multiple of the identity": lambda: 0 * build("ggn") + 3 * Identity,
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_blocks_put_together_are_the_matrix(name):
    op = EXPRESSIONS[name]().lower(small())
    whole = op @ torch.eye(op.shape[1]).double()
    made, seen = torch.zeros_like(whole), torch.zeros(len(whole))
    for block in op.structure:
        made[block.rows[:, None], block.rows[None]] = block.dense()
        seen[block.rows] += 1
        names = op.problem.layout.names
        assert set(block.params) <= set(names)
    assert bool((seen == 1).all())
    torch.testing.assert_close(made, whole, rtol=1e-9, atol=1e-12 * float(whole.abs().max()))


def test_arrays_lie_as_documented():
    torch.manual_seed(0)
    X, y = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    net = nn.Linear(3, 2).double()
    (block,) = build("kfac").lower(Problem(net, nn.MSELoss(reduction="sum"), (X, y))).structure
    ones = torch.cat([X, torch.ones(7, 1).double()], 1)
    assert (block.kind, block.joint, block.params) == ("kronecker", True, ("weight", "bias"))
    # A is a mean, B the sum of loss Hessians, 2 I for each of the seven samples.
    torch.testing.assert_close(torch.kron(*block.factors), torch.kron(14 * torch.eye(2).double(), ones.T @ ones / 7))
    assert block.rows.tolist() == [0, 1, 2, 6, 3, 4, 5, 7]  # rows of [W | b]


def test_groups_of_a_convolution_are_stacks():
    block = next(b for b in build("kfac").lower(small()).structure if b.params[0] == "0.weight")
    assert [tuple(f.shape) for f in block.factors] == [(2, 2, 2), (2, 10, 10)]


def test_structure_is_refused_where_there_is_none(inside):
    problem = small()
    with pytest.raises(ExpressionError, match="matrix on parameters"):
        _ = build("jacobian").lower(problem).structure
    with inside.within(dense_limit=10), pytest.raises(ExpressionError, match="nystrom"):
        _ = build("hessian").lower(problem).structure


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_bound_expressions_are_the_matrix_on_any_problem(name):
    problem = small()
    expr = EXPRESSIONS[name]()
    expected = expr.lower(problem).to_dense()
    bound = expr.bound(problem)
    there = small(seed=1)
    for on in (problem, there):
        torch.testing.assert_close(bound.lower(on).to_dense(), expected, rtol=1e-9, atol=1e-11)


def test_bound_expressions_never_become_stale():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = Problem(net, nn.MSELoss(), (torch.randn(6, 3).double(), torch.randn(6, 2).double()))
    expr = inverse(build("kfac") + Identity)
    op, arrays = expr.lower(problem), expr.bound(problem).lower(problem)
    x = torch.randn(problem.size).double()
    before = arrays @ x
    assert torch.equal(op @ x, before)
    with torch.no_grad():
        net[0].weight.add_(1)
    assert torch.equal(arrays @ x, before)
    assert torch.equal((2 * arrays) @ x, 2 * before)
    with pytest.raises(StaleError):
        op @ x


def test_arrays_and_terms_together_are_watched():
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    problem = Problem(net, nn.MSELoss(), (torch.randn(6, 3).double(), torch.randn(6, 2).double()))
    op = (build("kfac").bound(problem) + build("hessian")).lower(problem)
    op @ torch.ones(8).double()
    with torch.no_grad():
        net.weight.add_(1)
    with pytest.raises(StaleError):
        op @ torch.ones(8).double()


def test_bound_blocks_are_refused_on_other_parameters():
    bound = build("kfac").bound(small())
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )
    net.append(nn.Linear(3, 3)).double()
    data = (torch.randn(12, 2, 4, 4).double(), torch.randint(3, (12,)))
    with pytest.raises(ExpressionError, match=r"7\.bias"):
        bound.lower(Problem(net, nn.CrossEntropyLoss(), data))
    with pytest.raises((ExpressionError, ProblemError), match="weight"):
        bound.lower(Problem(net, nn.CrossEntropyLoss(), data, params=["0.*"]))


def test_what_has_no_arrays_is_refused_with_the_cure(inside):
    problem = small()
    for expr in (build("jacobian"), build("loss_hessian")):
        with pytest.raises(ExpressionError, match="matrix on parameters"):
            expr.bound(problem)
    with inside.within(dense_limit=10), pytest.raises(ExpressionError, match="nystrom"):
        inverse(build("hessian") + Identity).bound(problem)
