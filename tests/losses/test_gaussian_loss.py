"""The Gaussian likelihood of a mean and a variance, with its coupling, clamp and shared variance."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvalg.errors import LossError
from curvalg.losses import GaussianNLL


class Prediction(NamedTuple):
    mean: Tensor
    variance: Tensor


def draw(shape, shared, seed, low=0.2):
    generator = torch.Generator().manual_seed(seed)
    mean, target = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    last = 1 if shared else shape[-1]
    return mean, low + torch.rand(*shape[:-1], last, generator=generator, dtype=torch.float64), target


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(3, 1), (3, 2), (2, 2, 3)]),
    shared=st.booleans(),
    full=st.booleans(),
    eps=st.sampled_from([1e-6, 0.6]),  # 0.6 clamps about half of the variances
    reduction=st.sampled_from(["mean", "sum"]),
    container=st.sampled_from([tuple, list, lambda pair: Prediction(*pair)]),
    seed=st.integers(0, 99),
)
def test_gaussian_is_torch(check, shape, shared, full, eps, reduction, container, seed):
    mean, variance, target = draw(shape, shared, seed)
    output = container((mean, variance))

    def reference(output, target, asked):
        return F.gaussian_nll_loss(output[0], target, output[1], full=full, eps=eps, reduction=asked)

    loss = GaussianNLL(full=full, eps=eps, reduction=reduction)
    check.split(loss, reference, output, target, (1,))
    check.derivatives(loss, reference, output, target)
    check.unmutated(loss, output, target)


@pytest.mark.parametrize("shared", [False, True])
def test_fisher_by_quadrature(check, shared):
    """E g gᵀ over targets t ~ N(μ, v), by Gauss-Hermite quadrature of the gradient, and by both signs."""
    mean, variance, _ = draw((2, 3), shared, seed=0)
    loss = GaussianNLL()
    # Nodes and weights that are exact for standard normal polynomials of degree 5; all combinations of the elements.
    nodes = torch.tensor([-(3**0.5), 0.0, 3**0.5], dtype=torch.float64)
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    wide = variance.expand(mean.shape)
    expected = torch.zeros(())
    for combination in torch.cartesian_prod(*[torch.arange(3)] * 3):
        target = mean + nodes[combination] * wide.sqrt()
        of_mean, of_variance = loss.at((mean, variance), target).gradient()
        gradient = torch.cat([of_mean, of_variance], 1)
        expected = expected + weights[combination].prod() * torch.einsum("ni,nj->nij", gradient, gradient)
    point = loss.at((mean, variance), mean)
    columns = expected.shape[-1]
    assert point.noise_shape == (2, columns) and point.weights.shape == (2, columns)
    for j in range(columns):
        unit = torch.eye(columns, dtype=torch.float64)[j].expand(2, -1)
        product = torch.cat(point.fisher_hvp((unit[:, :3], unit[:, 3:])), 1)
        torch.testing.assert_close(product, expected[:, :, j], rtol=1e-12, atol=1e-12)
    uniform = torch.tensor([0.25, 0.75]).reshape(2, 1, 1).expand(2, 2, columns)
    draws = point.pseudo_gradients(uniform, fisher=True)
    torch.testing.assert_close(draws[0], -draws[1])
    torch.testing.assert_close(draws[0].square(), expected.diagonal(dim1=1, dim2=2), rtol=1e-12, atol=1e-12)


def test_no_square_root_of_the_hessian():
    loss = GaussianNLL()
    assert loss.facts.convex is False and not loss.facts.fisher_is_ggn
    mean, variance, target = draw((2, 1), False, 0)
    point = loss.at((mean, variance), target)
    with pytest.raises(LossError, match="use the fisher"):
        point.factor()
    with pytest.raises(LossError, match="use the fisher"):
        point.pseudo_gradients(torch.rand(1, 2, 2))


def test_no_samples():
    point = GaussianNLL().at((torch.ones(0, 3), torch.ones(0, 1)), torch.ones(0, 3))
    assert point.value() == 0
    assert point.pseudo_gradients(torch.rand(2, 0, 4), fisher=True).shape == (2, 0, 4)


def test_module_options():
    module = nn.GaussianNLLLoss(full=True, eps=0.1, reduction="sum")
    assert GaussianNLL.from_module(module) == GaussianNLL(full=True, eps=0.1, reduction="sum")


ONES = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        (ONES, ONES, r"tuple \(mean, variance\), got Tensor"),
        ((ONES,), ONES, "tuple of 1"),
        ({"mean": ONES, "variance": ONES}, ONES, "got dict"),
        ((ONES, -ONES), ONES, r"variances.*got -1.0 at \(0, 0\)"),
        ((ONES, ONES[:, 0]), ONES, "unsqueeze"),
        ((ONES, ONES), ONES[:, :1], "same shape"),
        ((ONES, 2.0), ONES, "variance to be one tensor"),
    ],
)
def test_misfits_are_refused(output, target, message):
    with pytest.raises(LossError, match=message):
        GaussianNLL().at(output, target)


def test_bad_options_are_refused():
    with pytest.raises(LossError, match="eps"):
        GaussianNLL(eps=0.0)
    with pytest.raises(LossError, match="none"):
        GaussianNLL(reduction="none")
