"""Restrictions and blocks of operators."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import (
    Block,
    Diagonal,
    ExpressionError,
    Identity,
    Problem,
    ProblemError,
    block_diagonal,
    inverse,
    registry,
    restrict,
)
from tests.support.zoo import make


def test_restrictions_and_blocks(dense_of, problem_of, vectors):
    dense, problem = dense_of("mlp"), problem_of("mlp")
    H, J = dense.hessian, dense.jacobian
    layout = problem.layout
    keep = list(range(25, dense.D))
    op = restrict(registry.build("hessian") + Identity, "2.*").lower(problem)
    assert torch.allclose(op.to_dense(), H[keep][:, keep] + torch.eye(len(keep)).double(), atol=1e-13)
    assert torch.allclose(restrict(registry.build("jacobian"), "2.*").lower(problem).to_dense(), J[:, keep], atol=1e-13)
    V = vectors(dense.D)
    expected = torch.zeros_like(H)
    for s in layout.slices.values():
        expected[s, s] = H[s, s]
    assert torch.allclose(block_diagonal(registry.build("hessian")).lower(problem) @ V, expected @ V, atol=1e-13)
    by_module = torch.block_diag(H[:25, :25], H[25:, 25:])
    assert torch.allclose(
        block_diagonal(registry.build("hessian"), by="module").lower(problem) @ V, by_module @ V, atol=1e-13
    )
    mixed = block_diagonal({"0.*": registry.build("ggn"), "2.bias": 3 * Identity}).lower(problem)
    zero = torch.zeros_like(H)
    zero[:25, :25] = dense.ggn[:25, :25]
    zero[-3:, -3:] = 3 * torch.eye(3)
    assert torch.allclose(mixed @ V, zero @ V, atol=1e-13)


def test_parts_that_do_not_fit(problem_of):
    problem = problem_of("mlp")
    with pytest.raises(ProblemError, match="did you mean"):
        restrict(registry.build("ggn"), "0.weigth").lower(problem)
    with pytest.raises(ExpressionError, match="overlap"):
        block_diagonal({"0.*": registry.build("ggn"), "*.bias": Identity}).lower(problem)


def test_parts_of_what_is_not_local(dense_of, problem_of, vectors):
    """A sub-matrix of a product or an inverse is not the product or inverse of sub-matrices."""
    from curvalg import Diagonal
    from tests.support.third_party import GradientOuter

    dense, problem = dense_of("mlp"), problem_of("mlp")
    G, H, g = dense.ggn, dense.hessian, dense.gradient
    ggn, hessian = registry.build("ggn"), registry.build("hessian")
    A = torch.linalg.inv(G + torch.eye(dense.D))
    outer = torch.outer(g, g) / g.norm() ** 2
    values = torch.linspace(1, 2, dense.D).double()
    damped = torch.linalg.inv(outer + torch.eye(dense.D))
    V = vectors(dense.D)
    for expr, whole in (
        (ggn @ hessian, G @ H),
        (inverse(ggn + Identity), A),
        (inverse(ggn + Identity) @ hessian, A @ H),
        (Diagonal(values), torch.diag(values)),
        (GradientOuter(), outer),
        (GradientOuter() @ ggn, outer @ G),
        (inverse(GradientOuter() + Identity), damped),
        (ggn + GradientOuter() - 2 * Identity, G + outer - 2 * torch.eye(dense.D)),
    ):
        keep = list(range(25, dense.D))
        got = restrict(expr, "2.*").lower(problem)
        part = whole[keep][:, keep]
        if expr == GradientOuter() or "ggn + gradient_outer" in str(expr):
            # A matrix term sees the restricted problem: its gradient's norm is that of the kept part.
            scale = g.norm() ** 2 / g[keep].norm() ** 2
            part = part + (scale - 1) * outer[keep][:, keep]
        assert torch.allclose(got.to_dense(), part, atol=1e-9), str(expr)
        if "gradient_outer" not in str(expr):
            blocks = torch.block_diag(whole[:25, :25], whole[25:, 25:])
            assert torch.allclose(block_diagonal(expr, by="module").lower(problem) @ V, blocks @ V, atol=1e-9), str(
                expr
            )


@pytest.mark.parametrize("expr", ["restricted", "blocks"])
def test_refresh_takes_up_replaced_parameters_in_parts(expr, problem_of):
    from tests.support.dense import Dense

    case = make("mlp")
    hessian = registry.build("hessian")
    op = (restrict(hessian, "0.*") if expr == "restricted" else block_diagonal(hessian, by="module")).lower(
        problem_of(case)
    )
    op.to_dense()
    case.model.load_state_dict({k: 1.3 * v for k, v in case.model.state_dict().items()}, assign=True)
    H = Dense(case).hessian
    expected = H[:25, :25] if expr == "restricted" else torch.block_diag(H[:25, :25], H[25:, 25:])
    assert torch.allclose(op.refresh().to_dense(), expected, atol=1e-12)


def test_arrays_lie_as_the_rows_of_a_joint_block_also_inside_of_blocks():
    """The rows of [W | b] are those of an output one after the other: its weights, then its bias."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    problem = Problem(net, nn.MSELoss(), (torch.randn(4, 3).double(), torch.randn(4, 3).double()))
    inner = block_diagonal(Diagonal(torch.arange(1.0, 9).double()), by="parameter")
    op = block_diagonal([Block(("0.weight", "0.bias"), inner, joint=True)]).lower(problem)
    expected = torch.tensor([1, 2, 3, 5, 6, 7, 4, 8] + 9 * [0]).double()
    assert torch.equal(op.to_dense(), expected.diag())
