"""Callables that read outputs of any structure: what they are called with, and whether they add up over samples."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg.errors import LossError
from curvalg.losses import CallableLoss, infer_reduction
from curvalg.losses.additive import check_additive, check_additive_pair
from curvalg.problem.model import OutputForm
from tests.support.outputs import STRUCTURES, ModelOutput, Y, Z

W = torch.tensor([0.5, 2.0, 1.0]).double()


def test_callables_read_attributes_and_give_derivatives_of_the_same_structure():
    raw = STRUCTURES["model output"]
    loss = CallableLoss(lambda out, y: F.cross_entropy(out.logits, y) + out.extra[0].square().mean(), reduction="mean")
    point = loss.at(raw, Y)
    gradient = point.gradient()
    assert type(gradient) is ModelOutput and gradient.loss is None
    expected = torch.func.grad(lambda z: F.cross_entropy(z, Y, reduction="sum"))(Z)
    assert torch.allclose(gradient.logits, expected)
    form = OutputForm(raw, torch.device("cpu"))
    image = form.join(point.hvp(form.split(torch.ones(6, 6).double())))
    assert torch.allclose(image[:, :3].sum(), 2 * torch.ones(()).double() * 6)
    assert infer_reduction(lambda out, y: F.cross_entropy(out.logits, y), raw, Y) == "mean"


def test_losses_of_other_arguments_are_told_what_is_expected():
    for fn in (nn.CTCLoss(), nn.TripletMarginLoss(), lambda: torch.zeros(())):
        calls = (
            lambda fn=fn: CallableLoss(fn, reduction="mean").at(Z, Z),
            lambda fn=fn: infer_reduction(fn, Z, Z),
            lambda fn=fn: check_additive(fn, "mean", Z, Z),
        )
        for called in calls:
            with pytest.raises(LossError, match=r"expected a callable \(output, target\) -> scalar") as caught:
                called()
            assert isinstance(caught.value.__cause__, TypeError)


ADDITIVE = {
    "mean": (F.cross_entropy, "mean", Y),
    "sum": (functools.partial(F.cross_entropy, reduction="sum"), "sum", Y),
    "weighted sum": (functools.partial(F.cross_entropy, weight=W, reduction="sum"), "sum", Y),
    "sum with ignored labels": (functools.partial(F.cross_entropy, reduction="sum"), "sum", Y.where(Y > 0, -100)),
    "regression": (F.mse_loss, "mean", Z.roll(1, 0)),
    "zero": (F.mse_loss, "mean", Z),
    "cancels": (lambda z, y: (z - z.detach() + y).sum() * 1e-9 + (z - y).sum(), "sum", Z),
    "in place": (lambda z, y: z.sub_(y).square_().mean(), "mean", Z.roll(1, 0)),
    "structure": (lambda z, y: (y["scale"] * (z - y["mean"])).square().mean(), "mean",
                  {"mean": Z.roll(1, 0), "scale": torch.tensor(2.0), "name": "a"}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ADDITIVE)
def test_what_adds_up_passes(kind, dtype):
    fn, reduction, target = ADDITIVE[kind]
    output, before = Z.to(dtype), Z.to(dtype).clone()
    if dtype == torch.float32 and "weighted" in kind:
        fn = functools.partial(fn, weight=W.float())
    check_additive(fn, reduction, output, target)
    for cut in (1, 3):
        if isinstance(target, torch.Tensor):
            check_additive_pair(fn, reduction, output[:cut], target[:cut], output[cut:], target[cut:])
    assert torch.equal(output, before)


COUPLED = {
    "class weights": (functools.partial(F.cross_entropy, weight=W), "mean", Z, Y, "class weights.*CrossEntropy.*reduction="),
    "class weights in one half": (
        functools.partial(F.cross_entropy, weight=W), "mean", Z, torch.tensor([0, 1, 0, 2, 2, 1]), "halves.*class weights"),
    "ignored labels": (F.cross_entropy, "mean", Z, torch.tensor([0, 1, 2, -100, 1, 1]), "ignored labels"),
    "a half that is ignored": (F.cross_entropy, "mean", Z, torch.tensor([0, 1, 2, -100, -100, -100]), "nan.*ignored"),
    "samples coupled": (lambda z, y: (z - z.mean(0)).square().mean(), "mean", Z, Y, "coupled"),
    "a sum taken for a mean": (functools.partial(F.mse_loss, reduction="sum"), "mean", Z, 2 * Z + 1, "no mean"),
    "a mean taken for a sum": (F.mse_loss, "sum", Z, 2 * Z + 1, "no sum"),
    "a broadcast": (lambda z, y: (z - y).square().mean(), "mean", Z[:, :1], Z[:, 1],
                    r"output \(6, 1\) and target \(6,\) broadcast to \(6, 6\): use target\.reshape\(\(6, 1\)\)"),
    "a fixed number of rows": (lambda z, y: (z.reshape(6, 3) - y).square().mean(), "mean", Z, Z + 1, "number of rows"),
}  # fmt: skip


@pytest.mark.parametrize("kind", COUPLED)
def test_what_does_not_add_up_is_refused(kind):
    fn, reduction, output, target, message = COUPLED[kind]
    with pytest.raises(LossError, match=message):
        check_additive(fn, reduction, output, target)


def test_pairs_show_what_sorted_batches_hide():
    """One class in every batch: its weight cancels in each, but not from batch to batch."""
    weighted, labels = functools.partial(F.cross_entropy, weight=W), torch.tensor([0, 0, 0, 1, 1, 1])
    for part in (slice(0, 3), slice(3, 6)):
        check_additive(weighted, "mean", Z[part], labels[part])
    with pytest.raises(LossError, match=r"two batches.*class weights"):
        check_additive_pair(weighted, "mean", Z[:3], labels[:3], Z[3:], labels[3:])
    with pytest.raises(LossError, match="broadcast"):  # batches of one row, which no half shows
        check_additive_pair(lambda z, y: (z - y).square().mean(), "mean", Z[:1, :1], Z[:1, 1], Z[1:2, :1], Z[1:2, 1])


def test_batches_that_do_not_fit_together_are_not_compared():
    def fails(output, target):
        raise AssertionError("called")

    check_additive_pair(fails, "mean", Z, Y, Z[:, :2], Y)
    check_additive_pair(fails, "mean", Z, {"y": Y, "w": W}, Z, {"y": Y, "w": 2 * W})
    check_additive_pair(fails, "mean", Z, Y, Z[:0], Y[:0])
    check_additive(fails, "mean", Z[:1], Y[:1])
    check_additive(fails, "mean", Z, {"y": Y, "w": W})
