"""Sub-matrices over single numbers of parameters: Eᵀ A E for a selection E, whatever A is."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from curvalg import (
    ExpressionError,
    Identity,
    OptionError,
    Problem,
    ProblemError,
    block_diagonal,
    diagonal_part,
    inverse,
    nystrom,
    parse,
    registry,
    restrict,
    sqrt,
)
from curvalg.errors import CurvalgError
from curvalg.estimate import diagonal, eigsh, trace
from curvalg.expr import Diagonal, Entries

MASK = torch.tensor([[True, False, True], [False, False, True], [True, False, False], [False, True, False]])
KEPT = {"2.weight": torch.tensor([5, 1]), "0.weight": MASK, "2.bias": ..., "0.bias": slice(1, 4, 2)}
ROWS = [0, 2, 5, 6, 10, 12 + 1, 12 + 3, 16 + 1, 16 + 5, 24, 25]
"""By hand: weights 4 x 3 and 2 x 4 after each other, each with its bias."""
SIZES = {"0.weight": 5, "0.bias": 2, "2.weight": 2, "2.bias": 2}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(split=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    X, y = random(9, 3), random(9, 2, seed=1)
    return Problem(model, nn.MSELoss(), (X, y) if split is None else [(X[:split], y[:split]), (X[split:], y[split:])])


PROBLEM = made()
BUILD = {
    "hessian": lambda: registry.build("hessian"),
    "sum": lambda: 2 * registry.build("hessian") + registry.build("covariance") / 3 + 0.5 * Identity,
    "centred": lambda: registry.build("centered_covariance"),
    "kfac": lambda: registry.build("kfac") + 0.1 * Identity,
    "ekfac": lambda: registry.build("ekfac"),
    "diagonal": lambda: registry.build("ggn_diagonal") + 0.1 * Identity,
    "product": lambda: registry.build("hessian") @ registry.build("ggn"),
    "inverse": lambda: inverse(registry.build("ggn") + 0.1 * Identity),
    "root": lambda: sqrt(registry.build("ggn") + 0.1 * Identity),
    "blocks": lambda: block_diagonal(registry.build("hessian"), by="module"),
    "leaf": lambda: Diagonal(torch.arange(1.0, 27.0, dtype=torch.float64)),
    "nystrom": lambda: nystrom(registry.build("ggn"), 6) + 0.1 * Identity,
    "part": lambda: diagonal_part(registry.build("hessian")),
    "multiple": lambda: 3 * Identity,
}


def dense(expr, problem=PROBLEM):
    if expr.domain is None:
        return 3 * torch.eye(problem.size, dtype=torch.float64)
    return expr.lower(problem).to_dense()


@pytest.mark.parametrize("name", BUILD)
def test_rows_and_columns_of_the_whole(name):
    expr = BUILD[name]()
    whole = dense(expr)[ROWS][:, ROWS]
    op = restrict(expr, KEPT).lower(PROBLEM)
    assert op.shape == (11, 11)
    torch.testing.assert_close(op.to_dense(), whole)
    v = random(11, 3, seed=4)
    torch.testing.assert_close(op @ v, whole @ v)
    torch.testing.assert_close(op @ v[:, 0], whole @ v[:, 0])
    np.testing.assert_allclose(op @ v.numpy(), (whole @ v).numpy(), atol=1e-9)
    torch.testing.assert_close(op.T @ v, whole.T @ v)


@pytest.mark.parametrize("name", BUILD)
def test_exact_quantities_and_inverses(name):
    expr = BUILD[name]()
    whole = dense(expr)[ROWS][:, ROWS]
    op = restrict(expr, KEPT).lower(PROBLEM)
    if name != "product":
        assert op.exact("trace") == pytest.approx(whole.trace().item())
        torch.testing.assert_close(op.exact("diagonal"), whole.diagonal())
        pairs = op.exact("eigh")
        values = pairs.eigenvalues if pairs.multiplicity == 0 else torch.full((11,), pairs.rest, dtype=torch.float64)
        torch.testing.assert_close(values, torch.linalg.eigvalsh(whole), atol=1e-9, rtol=1e-6)
    b = random(11, seed=2)
    shifted = whole + 2 * torch.eye(11, dtype=torch.float64)
    for solver in ("auto", "dense"):
        solved = (
            inverse(restrict(expr, KEPT) + 2 * Identity, solver=solver if name != "multiple" else "auto").lower(PROBLEM)
            @ b
        )
        torch.testing.assert_close(solved, torch.linalg.solve(shifted, b), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", ["diagonal", "leaf", "part"])
def test_diagonals_stay_diagonal(name):
    op = restrict(BUILD[name](), KEPT).lower(PROBLEM)
    assert op.exact("trace") is not None
    assert op.exact_rows() == 0  # nothing is built
    assert "diagonal: chosen" in inverse(op.expr + Identity).lower(PROBLEM).prepare().explain()


def test_iterative_solves():
    ggn = registry.build("ggn") + 0.1 * Identity
    whole, b = dense(ggn)[ROWS][:, ROWS], random(11, seed=2)
    for expr in (inverse(restrict(ggn, KEPT), solver="cg"), inverse(restrict(ggn, KEPT), solver="minres", rtol=1e-12)):
        op = expr.lower(PROBLEM)
        torch.testing.assert_close(op @ b, torch.linalg.solve(whole, b), atol=1e-6, rtol=1e-6)
        assert op.last_solve.converged.all()


def test_against_torch():
    """The Hessian of the loss by the chosen numbers alone, all others held."""
    model = PROBLEM.model.module
    X, y = random(9, 3), random(9, 2, seed=1)
    names = [name for name, _ in model.named_parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    shapes = [p.shape for p in model.parameters()]

    def outputs(chosen):
        theta = flat.index_put((torch.tensor(ROWS),), chosen)
        parts = theta.split([shape.numel() for shape in shapes])
        tree = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(model, tree, (X,))

    at = flat[ROWS]
    H = torch.func.hessian(lambda chosen: nn.functional.mse_loss(outputs(chosen), y))(at)
    torch.testing.assert_close(restrict(registry.build("hessian"), KEPT).lower(PROBLEM).to_dense(), H)
    J = torch.func.jacrev(lambda chosen: outputs(chosen).reshape(-1))(at)
    jacobian = restrict(registry.build("jacobian"), KEPT)
    torch.testing.assert_close(jacobian.lower(PROBLEM).to_dense(), J)
    torch.testing.assert_close(jacobian.T.lower(PROBLEM).to_dense(), J.T)
    torch.testing.assert_close((jacobian.T @ jacobian).lower(PROBLEM).to_dense(), J.T @ J)
    crossed = jacobian.T @ registry.build("jacobian")
    assert crossed.lower(PROBLEM).shape == (11, 26)


def test_splits_of_the_data_agree():
    expr = restrict(registry.build("hessian") + registry.build("kfac"), KEPT)
    torch.testing.assert_close(dense(expr), dense(expr, made(4)))


def test_vectors_have_the_layout_of_what_is_kept():
    op = restrict(registry.build("hessian"), KEPT).lower(PROBLEM)
    v = {name: random(size, seed=3) for name, size in SIZES.items()}
    image = op @ v
    assert {name: tuple(part.shape) for name, part in image.items()} == {name: (size,) for name, size in SIZES.items()}
    torch.testing.assert_close(torch.cat(list(image.values())), op @ torch.cat(list(v.values())))
    whole = restrict(registry.build("hessian"), {"0.weight": ..., "2.bias": np.array([1])}).lower(PROBLEM)
    image = whole @ {"0.weight": torch.ones(4, 3, dtype=torch.float64), "2.bias": torch.ones(1, dtype=torch.float64)}
    assert image["0.weight"].shape == (4, 3)
    assert [(block.kind, block.size) for block in op.structure] == [("dense", 11)]


def test_whole_parameters_are_a_restriction_by_name():
    ggn = registry.build("ggn")
    assert restrict(ggn, {"0.*": ..., "2.bias": True}) == restrict(ggn, ["0.*", "2.bias"])
    mixed = restrict(ggn, {"0.*": ..., "2.bias": slice(1)}).lower(PROBLEM)
    rows = [*range(16), 24]
    torch.testing.assert_close(mixed.to_dense(), dense(ggn)[rows][:, rows])


def test_sums_products_and_equality():
    hessian, ggn = registry.build("hessian"), registry.build("ggn")
    again = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in KEPT.items()}
    one, other = restrict(hessian, KEPT), restrict(ggn, again)
    assert restrict(hessian, again) == one and hash(restrict(hessian, again)) == hash(one)
    assert restrict(one, KEPT) == one == restrict(hessian, Entries(KEPT))
    assert restrict(hessian, KEPT | {"0.weight": ~MASK}) != one
    assert (one - one).lower(PROBLEM).shape == (11, 11)
    H, G = dense(hessian)[ROWS][:, ROWS], dense(ggn)[ROWS][:, ROWS]
    torch.testing.assert_close(
        (2 * one - other + Identity).lower(PROBLEM).to_dense(), 2 * H - G + torch.eye(11, dtype=torch.float64)
    )
    torch.testing.assert_close((one @ other).lower(PROBLEM).to_dense(), H @ G)
    assert pickle.loads(pickle.dumps(one)) == one
    assert one.T.simplify() == one
    with pytest.raises(ExpressionError):
        one + hessian
    with pytest.raises(ExpressionError):
        one @ restrict(hessian, ["0.weight", "0.bias", "2.weight", "2.bias"])


def test_what_is_made_of_a_submatrix():
    ggn = restrict(registry.build("ggn"), KEPT)
    G = dense(registry.build("ggn"))[ROWS][:, ROWS]
    torch.testing.assert_close(dense(diagonal_part(ggn)), torch.diag(G.diagonal()))
    torch.testing.assert_close(dense(nystrom(ggn, 11)), G, atol=1e-6, rtol=1e-5)
    damped = inverse(ggn + Identity, preconditioner=diagonal_part(ggn) + Identity, solver="cg").lower(PROBLEM)
    b = random(11)
    torch.testing.assert_close(
        damped @ b, torch.linalg.solve(G + torch.eye(11, dtype=torch.float64), b), atol=1e-6, rtol=1e-6
    )
    root = sqrt(ggn + Identity).lower(PROBLEM).to_dense()
    torch.testing.assert_close(root @ root, G + torch.eye(11, dtype=torch.float64))


def test_estimators():
    op = restrict(registry.build("hessian"), KEPT).lower(PROBLEM)
    H = dense(registry.build("hessian"))[ROWS][:, ROWS]
    assert trace(op).value == pytest.approx(H.trace().item())
    torch.testing.assert_close(
        torch.as_tensor(diagonal(op, products=11).value).double(), H.diagonal(), atol=0.5, rtol=0.5
    )
    pairs = eigsh(op, k=2, which="LA", tol=1e-8)
    torch.testing.assert_close(torch.as_tensor(pairs.eigenvalues), torch.linalg.eigvalsh(H)[-2:], atol=1e-6, rtol=1e-6)


def test_arrays_alone():
    op = restrict(registry.build("hessian") + Identity, KEPT).lower(PROBLEM)
    bound = op.expr.bound(PROBLEM)
    torch.testing.assert_close(dense(bound), op.to_dense())


def test_printing_and_reading_back():
    entries = Entries(KEPT)
    expr = inverse(restrict(registry.build("ggn"), entries) + 0.1 * Identity)
    shown = str(expr)
    assert shown == f"inverse(restrict(ggn, {entries!r}) + 0.1*identity)"
    assert str(entries).startswith("Entries<0.bias[1:4:2], 0.weight[5], 2.bias, 2.weight[2]; ")
    assert parse(shown, leaves={str(entries): entries}) == expr
    assert parse("restrict(ggn, E)", leaves={"E": entries}) == restrict(registry.build("ggn"), KEPT)
    zero = restrict(registry.build("ggn"), entries) - restrict(registry.build("ggn"), entries)
    assert parse(str(zero), leaves={str(entries): entries}) == zero
    assert "0.weight[5]" in expr.tree() and "0.weight" in expr._repr_latex_()
    with pytest.raises(ExpressionError, match="leaves="):
        parse(shown)
    with pytest.raises(ExpressionError, match="second argument of restrict"):
        parse("ggn + E", leaves={"E": entries})


def test_entries_are_what_they_were():
    mask = MASK.clone()
    expr = restrict(registry.build("hessian"), {"0.weight": mask})
    mask.fill_(False)
    assert expr.lower(PROBLEM).shape == (5, 5)


WRONG = {
    "empty": ({}, OptionError, "mapping"),
    "no name": ({3: MASK}, OptionError, "mapping"),
    "floats": ({"0.weight": torch.ones(4, 3)}, OptionError, "boolean mask or integers.*mask = weight != 0"),
    "a list": ({"0.weight": [1, 2]}, OptionError, "integer array, a slice"),
    "False": ({"0.weight": False}, OptionError, "boolean mask"),
    "nothing": ({"0.weight": torch.zeros(4, 3, dtype=torch.bool)}, OptionError, "chooses nothing; leave"),
    "no integers": ({"0.weight": torch.zeros(0, dtype=torch.long)}, OptionError, "k ≥ 1"),
    "a matrix of integers": ({"0.weight": torch.ones(2, 2, dtype=torch.long)}, OptionError, r"\(k,\)"),
    "twice": ({"0.weight": torch.tensor([3, 1, 3])}, OptionError, "3 is given twice"),
    "negative": ({"0.weight": torch.tensor([-1])}, OptionError, "count from 0"),
    "backwards": ({"0.weight": slice(3, 0, -1)}, OptionError, "positive step"),
    "shape": ({"0.weight": MASK.T}, ProblemError, r"shape \(4, 3\), got \(3, 4\)"),
    "range": ({"0.bias": torch.tensor([0, 4])}, ProblemError, "4 is out of range.*4 numbers"),
    "empty slice": ({"0.bias": slice(9, 12)}, ProblemError, "chooses nothing of 4"),
    "unknown": ({"0.wieght": MASK}, ProblemError, "did you mean 0.weight"),
    "several": ({"0.*": slice(2)}, ProblemError, "several parameters.*name it"),
    "overlap": ({"0.*": ..., "0.bias": slice(2)}, ProblemError, "'0.bias' are chosen twice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_choices(name):
    kept, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        restrict(registry.build("ggn"), kept).lower(PROBLEM)


def test_refusals():
    ggn = registry.build("ggn")
    part = restrict(ggn, KEPT)
    with pytest.raises(ExpressionError, match="restrict the original"):
        restrict(part, {"0.weight": MASK})
    with pytest.raises(ExpressionError, match="restricted"):
        restrict(part, "0.weight")
    with pytest.raises(ExpressionError, match="chooses parameters"):
        restrict(registry.build("loss_hessian"), KEPT)
    with pytest.raises(ExpressionError, match=r"restrict\(block_diagonal\(A\), entries\)"):
        block_diagonal({"0.weight": restrict(ggn, {"0.weight": MASK})}).lower(PROBLEM)
    with pytest.raises(CurvalgError, match="restricted"):
        block_diagonal(part).lower(PROBLEM).to_dense()


def test_the_order_in_which_names_are_given_does_not_matter():
    turned = dict(reversed(KEPT.items()))
    assert list(turned) != list(KEPT)
    assert Entries(turned) == Entries(KEPT) and str(Entries(turned)) == str(Entries(KEPT))
    G, H = registry.build("ggn"), registry.build("hessian")
    assert restrict(G, turned) == restrict(G, KEPT)
    together = restrict(G, turned) + restrict(H, KEPT)
    both = dense(G) + dense(H)
    torch.testing.assert_close(dense(together), both[ROWS][:, ROWS])
