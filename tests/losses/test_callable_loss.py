"""Any callable as a loss, and the inference of its reduction."""

from __future__ import annotations

import functools

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg.errors import CurvalgWarning, LossError
from curvalg.losses import CallableLoss, CrossEntropy, infer_reduction, resolve_loss


def quartic(output, target):
    return (output - target).pow(4).flatten(1).sum(1).mean()


def coupled(output, target):
    """Mean over rows of a loss that couples the two outputs of a row."""
    return (output["a"] * target).sum(1).exp().mean() + (
        output["b"].flatten(1).sum(1) * output["a"][:, 0]
    ).cosh().mean()


def torch_of(fn):
    def reference(output, target, asked):
        rows = len(optree.tree_leaves(target)[0])
        return fn(output, target) * (rows if asked == "sum" else 1)

    return reference


@pytest.mark.parametrize(
    "fn",
    [quartic, F.mse_loss, F.soft_margin_loss, torch.compiler.disable(quartic)],
    ids=["quartic", "mse", "margin", "wrapped"],
)
def test_callables_are_autograd(check, fn):
    output, target = torch.randn(2, 4, 3, dtype=torch.float64)
    target = target.sign()
    loss = CallableLoss(fn, reduction="mean")
    check.split(loss, torch_of(fn), output, target, (1,))
    check.derivatives(loss, torch_of(fn), output, target)
    check.unmutated(loss, output, target)
    _, hessian = check.dense_hessian(torch_of(fn), output, target)
    point = loss.at(output, target)
    columns = point.factor()
    assert columns.shape == (3, 4, 3)
    blocks = torch.einsum("kni,knj->nij", columns, columns)
    torch.testing.assert_close(torch.block_diag(*blocks), hessian, rtol=1e-10, atol=1e-11)
    # All sign patterns of three columns: the mean of s sᵀ is exact.
    patterns = torch.cartesian_prod(*[torch.tensor([0.25, 0.75])] * 3).double()
    draws = point.pseudo_gradients(patterns.unsqueeze(1).expand(8, *point.noise_shape))
    torch.testing.assert_close(torch.einsum("sni,snj->nij", draws, draws) / 8, blocks, rtol=1e-10, atol=1e-11)
    assert torch.equal(loss.weights(target), torch.ones(4)) and point.weights.shape == (4, 1)
    assert loss.facts.convex is None and point.labels is None


def test_several_outputs(check):
    output = {"b": torch.randn(3, 2, 2, dtype=torch.float64), "a": torch.randn(3, 2, dtype=torch.float64)}
    target = torch.randn(3, 2, dtype=torch.float64)
    loss = CallableLoss(coupled, reduction="mean")
    check.split(loss, torch_of(coupled), output, target, (2,))
    check.derivatives(loss, torch_of(coupled), output, target)
    convex = CallableLoss(
        lambda z, t: (z["a"].sum(1) + z["b"].flatten(1).sum(1) - t[:, 0]).square().sum(), reduction="sum"
    )
    factor = convex.at(output, target).factor()
    assert factor.shape == (6, 3, 6)
    wanted = torch.full((3, 6, 6), 2.0, dtype=torch.float64)
    torch.testing.assert_close(torch.einsum("kni,knj->nij", factor, factor), wanted, rtol=1e-10, atol=1e-10)


def test_works_without_grad_mode_and_inside_a_batched_backward():
    output, target = torch.randn(4, 3), torch.randn(4, 3)
    with torch.no_grad():
        point = CallableLoss(F.mse_loss, reduction="mean").at(output, target)
        torch.testing.assert_close(point.hvp(torch.ones(4, 3)), torch.full((4, 3), 2 / 3))

    class Cotangent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z * 0

        @staticmethod
        def backward(ctx, tangent):
            return point.hvp(tangent)

    z = torch.randn(4, 3, requires_grad=True)
    tangents = torch.randn(5, 4, 3)
    (products,) = torch.autograd.grad(Cotangent.apply(z), z, tangents, is_grads_batched=True)
    torch.testing.assert_close(products, 2 / 3 * tangents)


def test_no_samples():
    point = CallableLoss(F.mse_loss, reduction="sum").at(torch.zeros(0, 3), torch.zeros(0, 3))
    assert point.factor().shape == (3, 0, 3)
    assert point.pseudo_gradients(torch.rand(2, 0, 3)).shape == (2, 0, 3)


def test_a_callable_that_works_in_place_hurts_nobody():
    output = torch.randn(4, 3)
    copy = output.clone()
    point = CallableLoss(lambda z, t: z.sub_(t).square_().sum(), reduction="sum").at(output, torch.ones(4, 3))
    assert torch.equal(output, copy)
    torch.testing.assert_close(point.gradient(), 2 * (output - 1))


def test_indefinite_hessian_has_no_square_root():
    point = CallableLoss(lambda z, t: (z[:, 0] * z[:, 1]).sum(), reduction="sum").at(torch.ones(2, 2), torch.ones(2))
    with pytest.raises(LossError, match="least eigenvalue -1"):
        point.factor()


def test_rounding_is_no_negative_eigenvalue():
    torch.manual_seed(0)
    output = 5 * torch.randn(20, 6)
    point = CallableLoss(F.cross_entropy, reduction="mean").at(output, torch.randint(6, (20,)))
    exact = CrossEntropy().at(output, torch.zeros(20).long()).factor()
    blocks = [torch.einsum("kni,knj->nij", columns, columns) for columns in (point.factor(), exact)]
    torch.testing.assert_close(*blocks, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fn", "output", "target", "message"),
    [
        (lambda z, t: (z - t).square(), torch.ones(2, 1), torch.ones(2, 1), "scalar, got a tensor of shape"),
        (lambda z, t: float((z - t).detach().sum()), torch.ones(2, 1), torch.ones(2, 1), "got float"),
        (lambda z, t: t.sum(), torch.ones(2, 1), torch.ones(2, 1), "does not depend on the output"),
        (F.mse_loss, torch.ones(2, 1), None, "first axis"),
        (F.mse_loss, torch.ones(2, 1).long(), torch.ones(2, 1), "floating-point"),
        (F.mse_loss, {}, torch.ones(2, 1), "output of tensors"),
        (F.mse_loss, (torch.ones(2, 1), torch.ones(3, 1)), torch.ones(2, 1), "output of tensors"),
    ],
)
def test_misfits_are_refused(fn, output, target, message):
    with pytest.raises(LossError, match=message):
        CallableLoss(fn, reduction="mean").at(output, target)


def test_options_and_fisher_are_refused():
    with pytest.raises(LossError, match="none"):
        CallableLoss(quartic, reduction="none")
    with pytest.raises(LossError, match="callable"):
        CallableLoss(3)
    point = CallableLoss(quartic).at(torch.ones(2, 1), torch.ones(2, 1))
    for call in (
        lambda: point.fisher_hvp(torch.ones(2, 1)),
        lambda: point.pseudo_gradients(torch.rand(1, 2, 1), fisher=True),
    ):
        with pytest.raises(LossError, match="quartic is not declared"):
            call()


def test_tensors_of_modules_and_partials():
    module = nn.BCELoss(weight=torch.ones(2))
    assert set(CallableLoss(module).tensors()) == {"weight"}
    partial = functools.partial(lambda z, t, *, scale: (scale * (z - t)).sum(), scale=torch.ones(1))
    assert set(CallableLoss(partial).tensors()) == {"scale"} and CallableLoss(quartic).tensors() == {}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2)])
def test_nll_follows_weights_and_ignored_labels(check, reduction, weighted, shape):
    output = torch.randn(shape, dtype=torch.float64).log_softmax(1)
    target = torch.randint(3, (5, *shape[2:]))
    target[1], target[2] = -100, 0
    weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64) if weighted else None
    with pytest.warns(CurvalgWarning, match="ggn is zero; use CrossEntropy"):
        loss = resolve_loss(nn.NLLLoss(weight=weight, reduction=reduction))

    def reference(z, t, asked):
        return F.nll_loss(z, t, weight=weight, reduction=asked)

    check.split(loss, reference, output, target, (1, 2))
    check.derivatives(loss, reference, output, target)
    point = loss.at(output, target)
    assert torch.equal(point.weights.squeeze(1), loss.weights(target).double()) and int(point.labels.min()) >= 0


INFERRED = {
    "mean": (F.mse_loss, "mean"),
    "sum": (functools.partial(F.mse_loss, reduction="sum"), "sum"),
    "own": (quartic, "mean"),
    "negative": (lambda z, t: -(z * t).sum(), "sum"),
    "cancels": (lambda z, t: (z - z.mean().detach()).sum() * 0 + (z - t).sum() * 2, "sum"),
}


@pytest.mark.parametrize("name", INFERRED)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reduction_is_inferred(name, rows, dtype):
    fn, wanted = INFERRED[name]
    torch.manual_seed(rows)
    assert infer_reduction(fn, torch.randn(rows, 3, dtype=dtype), torch.randn(rows, 3, dtype=dtype)) == wanted


@pytest.mark.parametrize(("fn", "wanted"), [(F.mse_loss, "mean"), (lambda z, t: (z - t).square().sum(), "sum")])
def test_zero_and_cancelling_values_are_perturbed(fn, wanted):
    target = torch.randn(4, 2)
    assert infer_reduction(fn, target.clone(), target) == wanted

    def signed(output, truth):
        return output.sum() if wanted == "sum" else output.mean()

    assert infer_reduction(signed, torch.tensor([[1.0], [-1.0], [2.0], [-2.0]]), torch.zeros(4, 1)) == wanted


def test_reduction_of_structures():
    output = {"a": torch.randn(4, 2), "b": torch.randn(4, 2, 2)}
    target = {"y": torch.randn(4, 2), "scale": torch.tensor(2.0), "name": "x"}
    assert infer_reduction(lambda z, t: t["scale"] * coupled(z, t["y"]), output, target) == "mean"


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda z, t: (z - t).square().sum().sqrt(), "repeated"),
        (lambda z, t: (z - z.mean(0)).square().mean(), "two parts"),
        (lambda z, t: z.sum() * 0, "zero"),
        (lambda z, t: z.sum() / 0, "inf|nan"),
        (lambda z, t: z, "scalar tensor"),
        (lambda z, t: 1.0, "scalar tensor"),
    ],
)
def test_reductions_that_cannot_be_told(fn, message):
    torch.manual_seed(0)
    with pytest.raises(LossError, match=message):
        infer_reduction(fn, torch.randn(5, 3), torch.randn(5, 3))
    with pytest.raises(LossError, match="no rows"):
        infer_reduction(fn, torch.randn(0, 3), torch.randn(0, 3))


def test_ignored_labels_are_found_out():
    """A mean over unequally many labels is not a mean over rows; the message names the cause."""
    target = torch.tensor([0, -100, -100, 1, 2])
    torch.manual_seed(0)
    with pytest.raises(LossError, match=r"ignored labels.*Pass reduction="):
        infer_reduction(lambda z, t: F.cross_entropy(z, t), torch.randn(5, 3), target)
