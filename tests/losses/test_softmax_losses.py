"""Cross-entropy and the KL divergence of logits: options, shapes and targets against torch."""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvalg.errors import LossError
from curvalg.losses import CrossEntropy, KLDivWithLogits

N, C = 4, 3
SHAPES = [((N, C), 1), ((N, C, 2), 1), ((N, C, 2, 2), 1), ((N, 2, C), -1), ((N, C), -1)]


def draw(shape, axis, seed, *, soft, ignored=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    output = 2 * torch.randn(shape, generator=generator, dtype=dtype)
    if soft:
        return output, 2 * torch.rand(shape, generator=generator, dtype=dtype)
    positions = list(shape)
    classes = positions.pop(axis)
    target = torch.randint(classes, positions, generator=generator)
    hidden = torch.rand(positions, generator=generator) < ignored
    return output, torch.where(hidden, 1, target)


def torch_cross_entropy(loss):
    def reference(output, target, reduction):
        target = target.movedim(loss.class_axis, 1) if target.is_floating_point() else target
        return F.cross_entropy(
            output.movedim(loss.class_axis, 1),
            target,
            weight=loss.weight,
            ignore_index=loss.ignore_index,
            label_smoothing=loss.label_smoothing,
            reduction=reduction,
        )

    return reference


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(SHAPES),
    seed=st.integers(0, 1000),
    soft=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    ignored=st.sampled_from([0.0, 0.5]),
    cut=st.integers(1, N - 1),
)
def test_cross_entropy_is_torch(check, case, seed, soft, weighted, smoothing, reduction, ignored, cut):
    shape, axis = case
    output, target = draw(shape, axis, seed, soft=soft, ignored=ignored)
    weight = torch.tensor([0.5, 0.0, 3.0], dtype=torch.float64) if weighted else None
    ignore = 1 if ignored and not soft else -100
    loss = CrossEntropy(
        weight=weight, ignore_index=ignore, label_smoothing=smoothing, reduction=reduction, class_axis=axis
    )
    reference = torch_cross_entropy(loss)
    if loss.denominator(target) > 0 or reduction == "sum":  # torch gives NaN where nothing counts
        check.split(loss, reference, output, target, (cut,))
    check.derivatives(loss, reference, output, target)
    assert check.factor(loss, reference, output, target).shape == (C - 1, *shape)
    check.label_draws(loss, reference, output, target)
    check.unmutated(loss, output, target)
    point = loss.at(output, target)
    assert torch.equal(point.weights.squeeze(axis), loss.weights(target).to(output.dtype))


@settings(max_examples=30, deadline=None)
@given(
    case=st.sampled_from(SHAPES),
    seed=st.integers(0, 1000),
    log_target=st.booleans(),
    reduction=st.sampled_from(["batchmean", "mean", "sum"]),
)
def test_kl_with_logits_is_torch(check, case, seed, log_target, reduction):
    shape, axis = case
    output, target = draw(shape, axis, seed, soft=True)
    target = target.log_softmax(axis) if log_target else target
    loss = KLDivWithLogits(log_target=log_target, reduction=reduction, class_axis=axis)

    def reference(output, target, asked):
        asked = "batchmean" if asked == "mean" and reduction == "batchmean" else asked
        with warnings.catch_warnings():  # torch warns of its own "mean"
            warnings.simplefilter("ignore")
            return F.kl_div(output.log_softmax(axis), target, reduction=asked, log_target=log_target)

    assert loss.reduction == ("sum" if reduction == "sum" else "mean")
    check.split(loss, reference, output, target, (1, 3))
    check.derivatives(loss, reference, output, target)
    check.factor(loss, reference, output, target)
    check.label_draws(loss, reference, output, target)
    check.unmutated(loss, output, target)


def test_kl_options_survive_a_round_trip():
    loss = KLDivWithLogits(reduction="batchmean")
    assert eval(repr(loss)) == loss
    assert (
        loss.denominator(torch.ones(4, 3)) == 4
        and KLDivWithLogits(reduction="mean").denominator(torch.ones(4, 3)) == 12
    )
    module = nn.KLDivLoss(log_target=True, reduction="batchmean")
    assert KLDivWithLogits.from_module(module) == KLDivWithLogits(log_target=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hot", [0, 1, 2])
def test_saturated_probabilities(check, dtype, hot):
    """p is one-hot to rounding: no NaN, and tiny probabilities keep their relative accuracy."""
    output = torch.zeros(2, 3, dtype=dtype)
    output[0, hot], output[1, hot] = 40.0, 2000.0
    point = CrossEntropy().at(output, torch.tensor([0, 2]))
    factor = point.factor()
    assert factor.isfinite().all() and point.hvp(torch.ones_like(output)).isfinite().all()
    exact = output[0].double().softmax(0)
    wanted = torch.diag(exact) - torch.outer(exact, exact)
    wanted[hot, hot] = exact[hot] * (
        exact.sum() - exact[hot] if exact[hot] < 0.9 else exact[torch.arange(3) != hot].sum()
    )
    block = torch.einsum("ki,kj->ij", factor[:, 0].double(), factor[:, 0].double())
    scale = wanted.abs().max()
    torch.testing.assert_close(block / scale, wanted / scale, rtol=1e-5, atol=1e-6)
    assert not factor[:, 1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_probabilities_next_to_nothing(dtype, place):
    """Below the least normal number 1/p is infinite, and what it is multiplied by can be zero."""
    least = math.log(torch.finfo(dtype).tiny)
    gaps = torch.linspace(least - 16, least + 4, 80, dtype=dtype)
    output = torch.stack([gaps, gaps - 3, gaps + 1], 1)
    output = torch.cat([output[:, :place], torch.zeros(len(gaps), 1, dtype=dtype), output[:, place:]], 1)
    factor = CrossEntropy().at(output, torch.zeros(len(gaps), dtype=torch.long)).factor()
    assert factor.isfinite().all()
    block = torch.einsum("kni,knj->nij", factor.double(), factor.double())
    assert float(block.abs().max()) <= 1000 * torch.finfo(dtype).tiny


def test_a_class_of_probability_zero_is_never_drawn():
    output = torch.tensor([[0.0, -2000.0, 0.0, -2000.0]])
    # The last one is 1 in the output's single precision.
    edges = torch.tensor([1e-30, 0.5, 1 - 1e-12], dtype=torch.float64).reshape(3, 1)
    draws = CrossEntropy().at(output, torch.tensor([0])).pseudo_gradients(edges)
    assert (draws[:, 0, [1, 3]] == 0).all() and (draws < 0).sum() == 3


def test_stratified_grid_of_uniforms_gives_exactly_the_hessian(check):
    """p = (1, 2, 5)/8 and the midpoints of eight intervals: every label is drawn p times eight."""
    output = torch.tensor([[1.0, 2.0, 5.0], [5.0, 2.0, 1.0]], dtype=torch.float64).log()
    loss = CrossEntropy(weight=torch.tensor([1.0, 2.0, 3.0]))
    point = loss.at(output, torch.tensor([1, 2]))
    grid = ((torch.arange(8, dtype=torch.float64) + 0.5) / 8).reshape(8, 1).expand(8, 2)
    draws = point.pseudo_gradients(grid)
    hessian = torch.stack([point.hvp(e.reshape(2, 3)).reshape(-1) for e in torch.eye(6, dtype=torch.float64)])
    torch.testing.assert_close(check.outer(draws / 8**0.5, 1), hessian, rtol=1e-12, atol=1e-14)


def test_one_class_and_no_samples():
    point = CrossEntropy().at(torch.zeros(2, 1), torch.zeros(2).long())
    assert point.factor().shape == (1, 2, 1) and not point.hvp(torch.ones(2, 1)).any()
    point = CrossEntropy().at(torch.zeros(0, 3), torch.zeros(0).long())
    assert point.value() == 0 and point.factor().shape == (2, 0, 3)
    assert point.pseudo_gradients(torch.rand(5, 0)).shape == (5, 0, 3)


def test_everything_ignored_gives_zero_shares():
    point = CrossEntropy(label_smoothing=0.1).at(torch.randn(2, 3), torch.full((2,), -100))
    for result in (point.value(), point.gradient(), point.hvp(torch.ones(2, 3)), point.factor(), point.weights):
        assert not result.any()
    assert CrossEntropy().denominator(torch.full((2,), -100)) == 0


def test_smoothed_mass_and_labels():
    loss = CrossEntropy(weight=torch.tensor([1.0, 2.0, 6.0]), label_smoothing=0.3)
    target = torch.tensor([0, -100, 2])
    torch.testing.assert_close(loss.weights(target), torch.tensor([0.7 * 1 + 0.9, 0.0, 0.7 * 6 + 0.9]))
    assert loss.denominator(target) == 7.0
    point = loss.at(torch.randn(3, 3), target)
    assert point.labels.tolist() == [0, 0, 2]
    soft = torch.tensor([[0.2, 0.8, 0.0]])
    assert CrossEntropy().at(torch.randn(1, 3), soft).labels.tolist() == [1]


def test_negative_class_weight_is_not_convex():
    loss = CrossEntropy(weight=torch.tensor([1.0, -1.0]))
    assert loss.facts.convex is False
    point = loss.at(torch.zeros(1, 2), torch.tensor([1]))
    for root in (point.factor, functools.partial(point.pseudo_gradients, torch.rand(1, 1))):
        with pytest.raises(LossError, match="positive semi-definite"):
            root()


def test_weights_take_the_outputs_dtype():
    loss = CrossEntropy(weight=torch.ones(3, dtype=torch.float64))
    assert loss.at(torch.randn(2, 3), torch.tensor([0, 1])).gradient().dtype == torch.float32
    assert set(loss.tensors()) == {"weight"} and CrossEntropy().tensors() == {}


def test_module_options():
    module = nn.CrossEntropyLoss(weight=torch.ones(3), ignore_index=2, label_smoothing=0.2, reduction="sum")
    loss = CrossEntropy.from_module(module)
    assert loss.weight is module.weight
    assert (loss.ignore_index, loss.label_smoothing, loss.reduction, loss.class_axis) == (2, 0.2, "sum", 1)


LONG = torch.zeros(4, dtype=torch.long)
ERRORS = {
    "label too large": (CrossEntropy(), torch.zeros(4, 3), torch.tensor([0, 1, 3, 9]), r"from 0 to 2.*got 3 at \(2,\)"),
    "label negative": (CrossEntropy(), torch.zeros(2, 3), torch.tensor([0, -1]), r"got -1 at \(1,\)"),
    "ignore_index not hit": (CrossEntropy(ignore_index=5), torch.zeros(1, 3), torch.tensor([-100]), "ignore_index=5"),
    "classes last": (CrossEntropy(), torch.zeros(4, 5, 3), torch.zeros(4, 5).long(), "class_axis=-1"),
    "classes on axis 1": (
        CrossEntropy(class_axis=-1),
        torch.zeros(4, 3, 5),
        torch.zeros(4, 5).long(),
        "class_axis=1",
    ),
    "flattened": (CrossEntropy(), torch.zeros(20, 3), torch.zeros(4, 5).long(), "class_axis=-1.*flatten"),
    "one-hot integers": (CrossEntropy(), torch.zeros(4, 3), torch.zeros(4, 3).long(), r"target\.float"),
    "unbatched": (CrossEntropy(), torch.zeros(3), torch.tensor(0), "unbatched"),
    "sample axis": (CrossEntropy(class_axis=0), torch.zeros(4, 3), LONG, "class_axis"),
    "no such axis": (CrossEntropy(class_axis=2), torch.zeros(4, 3), LONG, "class_axis"),
    "weight length": (CrossEntropy(weight=torch.ones(2)), torch.zeros(4, 3), LONG, r"weight of shape \(3,\)"),
    "float labels": (CrossEntropy(), torch.zeros(4, 3), torch.zeros(4), r"target\.long"),
    "bool labels": (CrossEntropy(), torch.zeros(4, 3), torch.zeros(4).bool(), "bool"),
    "negative probability": (CrossEntropy(), torch.zeros(1, 2), torch.tensor([[2.0, -1.0]]), r"got -1.0 at \(0, 1\)"),
    "ignored soft": (CrossEntropy(ignore_index=1), torch.zeros(1, 2), torch.ones(1, 2), "probability targets"),
    "integer output": (CrossEntropy(), torch.zeros(4, 3).long(), LONG, "floating-point output"),
    "complex output": (CrossEntropy(), torch.zeros(4, 3, dtype=torch.cfloat), LONG, "floating-point output"),
    "tuple output": (CrossEntropy(), (torch.zeros(4, 3),), LONG, "one tensor, got tuple"),
    "dict target": (CrossEntropy(), torch.zeros(4, 3), {"y": LONG}, "target="),
    "KL with labels": (KLDivWithLogits(), torch.zeros(4, 3), LONG, "CrossEntropy"),
    "KL shape": (KLDivWithLogits(), torch.zeros(4, 3), torch.ones(4, 2), "shape"),
    "KL negative": (KLDivWithLogits(), torch.zeros(1, 2), -torch.ones(1, 2), "not negative"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_misfits_are_refused(case):
    loss, output, target, message = ERRORS[case]
    with pytest.raises(LossError, match=message):
        loss.at(output, target)


def test_label_out_of_range_is_refused_from_the_target_alone():
    loss = CrossEntropy(weight=torch.ones(3))
    for method in (loss.weights, loss.denominator):
        with pytest.raises(LossError, match=r"got 3 at \(1,\)"):
            method(torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CrossEntropy(reduction="none"), "reduction='none'.*use reduction='mean'"),
        (lambda: CrossEntropy(reduction="batchmean"), "expected reduction"),
        (lambda: CrossEntropy(label_smoothing=1.5), "label_smoothing"),
        (lambda: CrossEntropy(weight=torch.ones(2, 2)), "shape"),
        (lambda: CrossEntropy(weight=torch.ones(2).long()), "floating-point"),
        (lambda: CrossEntropy(weight=[1.0, 2.0]), "list"),
        (lambda: KLDivWithLogits(reduction="none"), "none"),
        (lambda: KLDivWithLogits(divisor="columns"), "divisor"),
        (lambda: KLDivWithLogits(reduction="batchmean", divisor="elements"), "batchmean"),
    ],
)
def test_bad_options_are_refused(build, message):
    with pytest.raises(LossError, match=message):
        build()


def test_uniform_numbers_must_fit():
    point = CrossEntropy().at(torch.zeros(4, 3), LONG)
    with pytest.raises(LossError, match=r"\(samples, 4\)"):
        point.pseudo_gradients(torch.rand(2, 4, 3))
