"""Scores of parameters equal the quadratic model's, and predict what removal does to the loss."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from curvalg import (
    ExpressionError,
    FactsError,
    Identity,
    OptionError,
    Problem,
    block_diagonal,
    estimate,
    inv_sqrt,
    inverse,
    registry,
)

build = registry.build


def trained(steps=400):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    X = torch.randn(60, 3).double()
    y = torch.stack([X[:, 0] * X[:, 1], X[:, 2]], 1) + 0.1 * torch.randn(60, 2).double()
    problem = Problem(net, nn.MSELoss(), (X, y))
    optimiser = torch.optim.LBFGS(net.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = nn.functional.mse_loss(net(X), y)
        loss.backward()
        return loss

    optimiser.step(closure)
    net.zero_grad()
    return net, problem


def flat(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


GROUPS = {"two": ["0.weight", "2.bias"], "places": [3, 1, 7], "mask": torch.arange(32) % 5 == 0, "pattern": "2.*"}
PLACES = {
    "two": [*range(15), 30, 31],
    "places": [3, 1, 7],
    "mask": list(range(0, 32, 5)),
    "pattern": list(range(20, 32)),
}


@pytest.mark.parametrize("kind", ["matrix", "inverse"])
def test_scores_are_those_of_the_quadratic_model(kind):
    net, problem = trained(20)
    w = flat(net)
    A = build("hessian").lower(problem).to_dense() + 0.5 * torch.eye(32).double()
    op = (build("hessian") + 0.5 * Identity).lower(problem)
    op = inverse(op.expr).lower(problem) if kind == "inverse" else op
    C = torch.linalg.inv(A)
    single = estimate.saliency(op)
    expected = w.square() / 2 * A.diagonal() if kind == "matrix" else w.square() / 2 / C.diagonal()
    torch.testing.assert_close(single.value, expected)
    assert not single.error.any()
    assert single.by_parameter()["2.weight"].shape == (2, 5)
    found = estimate.saliency(op, GROUPS)
    for name, value in zip(found.names, found.value, strict=True):
        at = torch.tensor(PLACES[name])
        block = A[at][:, at] if kind == "matrix" else torch.linalg.inv(C[at][:, at])
        torch.testing.assert_close(value, w[at] @ block @ w[at] / 2)


def test_adjusted_scores_are_the_constrained_minimum():
    """½ w_gᵀ (C_gg)⁻¹ w_g is the least of ½ δᵀAδ with δ_g = −w_g."""
    net, problem = trained(20)
    w, at = flat(net), torch.tensor(PLACES["pattern"])
    A = build("ggn").lower(problem).to_dense() + 0.1 * torch.eye(32).double()
    others = torch.tensor([i for i in range(32) if i not in PLACES["pattern"]])
    delta = torch.zeros(32).double()
    delta[at] = -w[at]
    delta[others] = -torch.linalg.solve(A[others][:, others], A[others][:, at] @ delta[at])
    op = inverse(build("ggn") + 0.1 * Identity).lower(problem)
    torch.testing.assert_close(estimate.saliency(op, {"g": "2.*"}).value[0], delta @ A @ delta / 2)


def test_rows_parameters_and_modules():
    _, problem = trained(5)
    op = build("ggn").lower(problem)
    assert len(estimate.saliency(op, "row").names) == 5 + 5 + 2 + 2
    assert estimate.saliency(op, "parameter").names == tuple(problem.layout.names)
    modules = estimate.saliency(op, "module")
    assert modules.names == ("0", "2")
    assert modules.by_parameter()["0"] == modules.value[0]


def change(net, problem, at):
    """The true change of the loss when some parameters are set to zero."""
    before, parts = problem.value(), [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        w = flat(net)
        w[at] = 0
        for p, part in zip(net.parameters(), problem.layout.unflatten(w).values(), strict=True):
            p.copy_(part)
        after = problem.value()
        for p, part in zip(net.parameters(), parts, strict=True):
            p.copy_(part)
    return after - before


def test_scores_rank_the_true_changes_of_the_loss():
    net, problem = trained()
    found = estimate.saliency(build("hessian").lower(problem))
    true = [change(net, problem, [i]) for i in range(32)]
    assert spearmanr(found.value, true).statistic > 0.8


def test_first_order_of_a_model_that_is_not_trained():
    net, problem = trained(3)
    with torch.no_grad():  # so that a removal is a small step
        for p in net.parameters():
            p.mul_(0.05)
    op = build("hessian").lower(problem)
    found = estimate.saliency(op, "row", first_order=True)
    places = [row for rows in (range(15), range(15, 20), range(20, 30), range(30, 32)) for row in [list(rows)]]
    rows = [places[0][3 * i : 3 * i + 3] for i in range(5)] + [[i] for i in places[1]]
    rows += [places[2][:5], places[2][5:]] + [[i] for i in places[3]]
    true = torch.tensor([change(net, problem, at) for at in rows]).double()
    assert float((found.value - true).norm() / true.norm()) < 0.05


def test_estimated_diagonals_have_errors(inside):
    _, problem = trained(5)
    exact = estimate.saliency(build("hessian").lower(problem))
    with inside.within(dense_limit=10):
        found = estimate.saliency(build("hessian").lower(problem), products=16)
    assert found.error.any()
    off = (found.value - exact.value).abs()
    assert float((off <= 4 * found.error + 1e-12).double().mean()) > 0.7


def test_kfac_scores_of_a_layer():
    net, problem = trained(20)
    expr = inverse(build("kfac") + 0.1 * Identity)
    op = expr.lower(problem)
    torch.testing.assert_close(estimate.saliency(op).value, flat(net).square() / 2 / op.to_dense().diagonal())


def test_plot():
    _, problem = trained(2)
    op = build("ggn").lower(problem)
    assert len(estimate.saliency(op, "parameter").plot().patches) == 4
    assert len(estimate.saliency(op).plot().patches) == 4


def test_wrong_arguments():
    _, problem = trained(1)
    op = build("ggn").lower(problem)
    with pytest.raises(ExpressionError, match="symmetric operator"):
        estimate.saliency(build("jacobian").lower(problem))
    for groups in ("layer", {}, {"a": [0, 0]}, {"a": [99]}, {"a": []}, {"a": torch.zeros(32, dtype=torch.bool)}):
        with pytest.raises(OptionError, match="saliency"):
            estimate.saliency(op, groups)
    with pytest.raises(OptionError, match="first_order"):
        estimate.saliency(inverse(build("ggn") + Identity).lower(problem), first_order=True)
    with pytest.raises(FactsError, match="not positive"):
        estimate.saliency(inverse(build("hessian") - 3 * Identity, solver="dense").lower(problem))


def test_inverses_are_seen_in_every_form():
    _, problem = trained(5)
    inverted = inverse(build("ggn") + 0.1 * Identity)
    expected = estimate.saliency(inverted.lower(problem)).value
    torch.testing.assert_close(estimate.saliency(inverted.T.lower(problem)).value, expected)
    torch.testing.assert_close(estimate.saliency((17 * inverted).lower(problem)).value, expected / 17)
    blocks = block_diagonal({"0.*": inverted, "2.*": inverted})
    by_blocks = inverse(block_diagonal({"0.*": build("ggn"), "2.*": build("ggn")}) + 0.1 * Identity)
    found = estimate.saliency(blocks.lower(problem))
    assert found.adjusted
    torch.testing.assert_close(found.value, estimate.saliency(by_blocks.lower(problem)).value)
    for mixed in (inverted + Identity, inverted + build("ggn"), inv_sqrt(build("ggn") + Identity)):
        with pytest.raises(ExpressionError, match="both, or of roots"):
            estimate.saliency(mixed.lower(problem))
    with pytest.raises(OptionError, match="first_order"):
        estimate.saliency((2 * inverted).lower(problem), first_order=True)


def test_slices_are_groups():
    _, problem = trained(2)
    op = build("ggn").lower(problem)
    pairs = estimate.saliency(op, {"a": slice(0, 3), "b": [0, 1, 2]}).value
    assert pairs[0] == pairs[1]
