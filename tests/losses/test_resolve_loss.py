"""What a user may pass as a loss, and what it becomes."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg.errors import CurvalgWarning, LossError
from curvalg.losses import (
    MSE,
    NLL,
    BCEWithLogits,
    CallableLoss,
    CrossEntropy,
    GaussianNLL,
    Huber,
    KLDiv,
    Loss,
    PoissonNLL,
    SmoothL1,
    resolve_loss,
)

PAIRS = [
    (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, BCEWithLogits),
    (nn.CrossEntropyLoss, F.cross_entropy, CrossEntropy),
    (nn.GaussianNLLLoss, F.gaussian_nll_loss, GaussianNLL),
    (nn.HuberLoss, F.huber_loss, Huber),
    (nn.KLDivLoss, F.kl_div, KLDiv),
    (nn.L1Loss, F.l1_loss, SmoothL1),
    (nn.MSELoss, F.mse_loss, MSE),
    (nn.NLLLoss, F.nll_loss, NLL),
    (nn.PoissonNLLLoss, F.poisson_nll_loss, PoissonNLL),
    (nn.SmoothL1Loss, F.smooth_l1_loss, SmoothL1),
]


def test_every_row_is_tested(inside):
    assert {module for module, _, _ in PAIRS} == set(inside["loss_modules"])
    assert {function for _, function, _ in PAIRS} == set(inside["loss_functions"])


@pytest.mark.filterwarnings("ignore::curvalg.errors.CurvalgWarning")
@pytest.mark.parametrize(("module", "function", "kind"), PAIRS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_tables(module, function, kind, reduction):
    for given in (module(reduction=reduction), functools.partial(function, reduction=reduction)):
        loss = resolve_loss(given)
        assert type(loss) is kind and loss.reduction == reduction
        assert resolve_loss(given, reduction=reduction).reduction == reduction
        other = "sum" if reduction == "mean" else "mean"
        with pytest.raises(LossError, match="contradicts"):
            resolve_loss(given, reduction=other)
    for given in (module(reduction="none"), functools.partial(function, reduction="none")):
        with pytest.raises(LossError, match="use reduction='mean'"):
            resolve_loss(given)
    assert type(resolve_loss(function)) is kind and resolve_loss(function).reduction == "mean"


def test_defaults_agree_with_torch():
    """The options that a row leaves alone have the defaults of torch."""
    for module, function, kind in PAIRS:
        if kind in (KLDiv, NLL):
            continue
        by_module, by_function = resolve_loss(module()), resolve_loss(function)
        assert vars(by_module) == vars(by_function)
    for kind in (KLDiv, NLL):
        with pytest.warns(CurvalgWarning, match="ggn is zero"):
            resolve_loss(next(function for _, function, k in PAIRS if k is kind))


def test_options_of_partials():
    weight = torch.ones(3)
    loss = resolve_loss(functools.partial(F.cross_entropy, label_smoothing=0.1, weight=weight, ignore_index=2))
    assert (loss.label_smoothing, loss.weight, loss.ignore_index) == (0.1, weight, 2)
    assert resolve_loss(functools.partial(F.huber_loss, delta=2.0)) == Huber(delta=2.0)
    nested = functools.partial(functools.partial(F.smooth_l1_loss, beta=0.5), reduction="sum")
    assert resolve_loss(nested) == SmoothL1(beta=0.5, reduction="sum")
    with pytest.warns(CurvalgWarning):
        kl = resolve_loss(functools.partial(F.kl_div, reduction="batchmean", log_target=True))
    assert kl.divisor == "rows" and kl.log_target


@pytest.mark.parametrize("option", ["size_average", "reduce"])
@pytest.mark.parametrize("function", [F.mse_loss, F.soft_margin_loss])
def test_legacy_options_are_refused_by_name(function, option):
    with pytest.raises(LossError, match=f"legacy option {option}"):
        resolve_loss(functools.partial(function, **{option: False}))


def test_unsupported_options_are_refused_by_name():
    with pytest.raises(LossError, match="mse_loss: the option weight is not supported"):
        resolve_loss(functools.partial(F.mse_loss, weight=torch.ones(2)))
    with pytest.raises(LossError, match="l1_loss: the option beta is not supported"):
        resolve_loss(functools.partial(F.l1_loss, beta=1.0))
    with pytest.raises(LossError, match="1 positional"):
        resolve_loss(functools.partial(F.cross_entropy, torch.zeros(2, 3)))


def test_torch_losses_without_closed_form():
    for given in (nn.SoftMarginLoss(reduction="sum"), functools.partial(F.soft_margin_loss, reduction="sum")):
        loss = resolve_loss(given)
        assert type(loss) is CallableLoss and loss.reduction == "sum" and loss.fn is given
        with pytest.raises(LossError, match="contradicts"):
            resolve_loss(given, reduction="mean")
    for given in (nn.SoftMarginLoss(reduction="none"), functools.partial(F.soft_margin_loss, reduction="none")):
        with pytest.raises(LossError, match="none"):
            resolve_loss(given)
    assert resolve_loss(F.soft_margin_loss).reduction == "mean"


def test_subclasses_of_torch_losses():
    class Renamed(nn.MSELoss):
        pass

    class Focal(nn.CrossEntropyLoss):
        def forward(self, output, target):
            return super().forward(output, target).square()

    assert resolve_loss(Renamed()) == MSE()
    loss = resolve_loss(Focal())
    assert type(loss) is CallableLoss and loss.reduction is None
    assert resolve_loss(Focal(), reduction="sum").reduction == "sum"
    patched = nn.MSELoss()
    patched.forward = lambda output, target: (output - target).abs().sum()
    assert type(resolve_loss(patched)) is CallableLoss


def test_callables_and_losses():
    def own(output, target):
        return (output - target).sum()

    class Own(nn.Module):
        def forward(self, output, target):
            return own(output, target)

    for given in (own, Own(), functools.partial(own), torch.dist):
        assert resolve_loss(given).reduction is None
        assert resolve_loss(given, reduction="sum").reduction == "sum"
    loss = CallableLoss(own, class_axis=1)
    assert resolve_loss(loss) is loss and resolve_loss(loss, reduction="mean").class_axis == 1
    closed = CrossEntropy(class_axis=-1)
    assert resolve_loss(closed) is closed and isinstance(closed, Loss)
    with pytest.raises(LossError, match="contradicts CrossEntropy"):
        resolve_loss(closed, reduction="sum")


@pytest.mark.parametrize("given", ["mse", None, 3])
def test_what_is_no_loss(given):
    with pytest.raises(LossError, match=type(given).__name__):
        resolve_loss(given)


def test_other_misuse():
    with pytest.raises(LossError, match=r"create it: MSELoss\(\)"):
        resolve_loss(nn.MSELoss)
    with pytest.raises(LossError, match="none"):
        resolve_loss(F.mse_loss, reduction="none")
