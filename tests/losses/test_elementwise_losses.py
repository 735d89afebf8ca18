"""Losses of elements: squared error, Huber, smooth L1, binary cross-entropy, Poisson, KL divergence, against torch."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvalg.errors import CurvalgWarning, LossError
from curvalg.losses import MSE, BCEWithLogits, Huber, KLDiv, PoissonNLL, SmoothL1


def quiet_kl(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KLDiv(**options)


def quiet_torch_kl(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return F.kl_div(*args, **options)


LOSSES = {
    "mse": (MSE(), lambda z, t, r: F.mse_loss(z, t, reduction=r)),
    "mse sum": (MSE(reduction="sum"), lambda z, t, r: F.mse_loss(z, t, reduction=r)),
    "huber": (Huber(delta=0.7), lambda z, t, r: F.huber_loss(z, t, delta=0.7, reduction=r)),
    "smooth": (SmoothL1(beta=0.6), lambda z, t, r: F.smooth_l1_loss(z, t, beta=0.6, reduction=r)),
    "l1": (SmoothL1(beta=0.0), lambda z, t, r: F.l1_loss(z, t, reduction=r)),
    "poisson": (PoissonNLL(full=True), lambda z, t, r: F.poisson_nll_loss(z, t, full=True, reduction=r)),
    "rates": (
        PoissonNLL(log_input=False, eps=0.3),
        lambda z, t, r: F.poisson_nll_loss(z, t, log_input=False, eps=0.3, reduction=r),
    ),
    "kl rows": (
        quiet_kl(reduction="batchmean"),
        lambda z, t, r: quiet_torch_kl(z, t, reduction="batchmean" if r == "mean" else r),
    ),
    "kl log": (quiet_kl(log_target=True), lambda z, t, r: quiet_torch_kl(z, t, reduction=r, log_target=True)),
    "kl sum": (quiet_kl(reduction="sum"), lambda z, t, r: quiet_torch_kl(z, t, reduction=r)),
}


def check_all(check, loss, reference, output, target):
    check.split(loss, reference, output, target, (1,))
    check.derivatives(loss, reference, output, target)
    assert check.factor(loss, reference, output, target).shape == (1, *output.shape)
    check.signs(loss, output, target)
    check.unmutated(loss, output, target)
    assert loss.weights(target).shape == target.shape and loss.at(output, target).labels is None
    assert loss.class_axis is None and not loss.facts.classes


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(LOSSES)), shape=st.sampled_from([(5,), (4, 1), (3, 2, 2)]), seed=st.integers(0, 99))
def test_losses_are_torch(check, name, shape, seed):
    loss, reference = LOSSES[name]
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    check_all(check, loss, reference, output.abs() if name == "rates" else output, target)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    weight=st.sampled_from([None, (3,), (1,), (2, 1), (2, 3), (1, 2, 3)]),
    positive=st.sampled_from([None, (3,), (1,), (2, 3)]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_binary_cross_entropy_is_torch(check, seed, weight, positive, reduction):
    generator = torch.Generator().manual_seed(seed)
    weight, positive = (
        None if shape is None else 2 * torch.rand(shape, generator=generator, dtype=torch.float64)
        for shape in (weight, positive)
    )
    output = 3 * torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    target = torch.rand(4, 2, 3, generator=generator, dtype=torch.float64)
    target[0] = target[0].round()

    def reference(z, t, r):
        return F.binary_cross_entropy_with_logits(z, t, weight=weight, pos_weight=positive, reduction=r)

    loss = BCEWithLogits(weight=weight, pos_weight=positive, reduction=reduction)
    check_all(check, loss, reference, output, target)
    assert loss.facts.convex and set(loss.tensors()) == {
        name for name, value in {"weight": weight, "pos_weight": positive}.items() if value is not None
    }
    if weight is not None:
        assert torch.equal(loss.weights(target), weight.expand(4, 2, 3))


def test_saturated_binary_logits():
    output = torch.tensor([[80.0, -80.0, 0.0]])
    point = BCEWithLogits().at(output, torch.tensor([[1.0, 0.0, 1.0]]))
    wanted = torch.tensor([-80.0, -80.0]).exp()
    torch.testing.assert_close(point.hvp(torch.ones(1, 3))[0, :2], wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(point.gradient()[0, :2].abs(), wanted, rtol=1e-5, atol=0)


def test_fisher_of_rates_by_summing_over_counts():
    """E (1 − t/k)² over counts t ~ Poisson(z), summed until nothing is left."""
    rates = torch.tensor([[0.4, 3.0]], dtype=torch.float64)
    loss = PoissonNLL(log_input=False, eps=0.2)
    counts = torch.arange(80, dtype=torch.float64).reshape(-1, 1)
    probability = (counts * rates.log() - rates - torch.lgamma(counts + 1)).exp()
    expected = (probability * (1 - counts / (rates + 0.2)).square()).sum(0, keepdim=True)
    point = loss.at(rates, torch.ones(1, 2))
    torch.testing.assert_close(point.fisher_hvp(torch.ones_like(rates)), expected, rtol=1e-12, atol=0)
    assert not loss.facts.fisher_is_ggn and PoissonNLL().facts.fisher_is_ggn


@pytest.mark.parametrize("loss", [Huber(), SmoothL1(), quiet_kl()], ids=lambda loss: loss.name)
def test_no_fisher_without_a_likelihood(loss):
    point = loss.at(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(LossError, match=f"{loss.name} is not declared"):
        point.fisher_hvp(torch.ones(1, 2))
    with pytest.raises(LossError, match="Use the ggn"):
        point.pseudo_gradients(torch.rand(1, 1, 2), fisher=True)


@pytest.mark.parametrize("option", ["weight", "pos_weight"])
def test_negative_weights_are_not_convex(option):
    loss = BCEWithLogits(**{option: torch.tensor([1.0, -1.0])})
    assert loss.facts.convex is False
    point = loss.at(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(LossError, match="positive semi-definite"):
        point.factor()
    with pytest.raises(LossError, match="positive semi-definite"):
        point.pseudo_gradients(torch.rand(1, 1, 2))


def test_targets_take_the_outputs_dtype():
    for target in (torch.ones(2, 1).long(), torch.ones(2, 1).double(), torch.ones(2, 1).bool()):
        assert MSE().at(torch.zeros(2, 1), target).gradient().dtype == torch.float32


def test_module_options():
    assert MSE.from_module(nn.MSELoss(reduction="sum")) == MSE(reduction="sum")
    assert Huber.from_module(nn.HuberLoss(delta=3.0)) == Huber(delta=3.0)
    assert SmoothL1.from_module(nn.SmoothL1Loss(beta=3.0)) == SmoothL1(beta=3.0)
    assert SmoothL1.from_module(nn.L1Loss()) == SmoothL1(beta=0.0)
    module = nn.PoissonNLLLoss(log_input=False, full=True, eps=0.1, reduction="sum")
    assert PoissonNLL.from_module(module) == PoissonNLL(log_input=False, full=True, eps=0.1, reduction="sum")
    binary = nn.BCEWithLogitsLoss(weight=torch.ones(2), pos_weight=torch.ones(2))
    loss = BCEWithLogits.from_module(binary)
    assert loss.weight is binary.weight and loss.pos_weight is binary.pos_weight


def test_kl_div_warns_and_has_no_curvature():
    with pytest.warns(CurvalgWarning, match="ggn is zero; use KLDivWithLogits"):
        loss = KLDiv.from_module(nn.KLDivLoss(reduction="batchmean", log_target=True))
    assert loss.reduction == "mean" and loss.divisor == "rows" and loss.log_target
    assert not loss.at(torch.randn(2, 3), torch.randn(2, 3)).hvp(torch.ones(2, 3)).any()


ERRORS = {
    "squeezed output": (
        MSE(),
        torch.zeros(4),
        torch.zeros(4, 1),
        r"output \(4,\) and target \(4, 1\).*reshape\(\(4,\)",
    ),
    "squeezed target": (Huber(), torch.zeros(4, 1), torch.zeros(4), r"target.reshape\(\(4, 1\)"),
    "other shape": (MSE(), torch.zeros(4, 2), torch.zeros(4, 3), "make the model's output"),
    "binary range": (BCEWithLogits(), torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]), r"got 2.0 at \(0, 1\)"),
    "weight": (BCEWithLogits(weight=torch.ones(5, 2)), torch.zeros(4, 2), torch.zeros(4, 2), "weight to broadcast"),
    "weight grows": (BCEWithLogits(weight=torch.ones(3, 4, 2)), torch.zeros(4, 2), torch.zeros(4, 2), "broadcast"),
    "pos_weight": (BCEWithLogits(pos_weight=torch.ones(3)), torch.zeros(4, 2), torch.zeros(4, 2), "pos_weight to"),
    "counts": (PoissonNLL(), torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), "counts >= 0"),
    "rates": (PoissonNLL(log_input=False), torch.tensor([[-1.0]]), torch.ones(1, 1), "rates z >= 0"),
    "zero rate": (PoissonNLL(log_input=False, eps=0.0), torch.zeros(1, 1), torch.ones(1, 1), "rates z >= 0"),
    "scalar": (MSE(), torch.tensor(0.0), torch.tensor(0.0), "first axis"),
    "integer output": (MSE(), torch.zeros(4).long(), torch.zeros(4), "floating-point"),
    "complex target": (MSE(), torch.zeros(4), torch.zeros(4, dtype=torch.cfloat), "real target"),
    "nan target": (BCEWithLogits(), torch.zeros(1), torch.tensor([float("nan")]), "got nan"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_misfits_are_refused(case):
    loss, output, target, message = ERRORS[case]
    with pytest.raises(LossError, match=message):
        loss.at(output, target)


@pytest.mark.parametrize(
    "build",
    [
        lambda: MSE(reduction="none"),
        lambda: Huber(delta=0.0),
        lambda: SmoothL1(beta=-1.0),
        lambda: PoissonNLL(eps=-1.0),
        lambda: BCEWithLogits(weight=2.0),
        lambda: BCEWithLogits(pos_weight=torch.ones(2).long()),
        lambda: BCEWithLogits(reduction="batchmean"),
        lambda: KLDiv(reduction="none"),
    ],
)
def test_bad_options_are_refused(build):
    with pytest.raises(LossError, match=r"expected|none"):
        build()
