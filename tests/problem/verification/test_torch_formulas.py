"""Formulas of torch that are known to be wrong. A test that fails here says that torch has mended one: take its correction out."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn


def pushed_and_pulled(f, x):
    """⟨u, J v⟩ by forward AD, and ⟨Jᵀu, v⟩."""
    v = torch.randn_like(x)
    with forward_ad.dual_level():
        z, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v)))
        tangent = torch.zeros_like(z) if tangent is None else tangent
    leaf = x.clone().requires_grad_()
    z = f(leaf)
    u = torch.randn_like(z)
    (g,) = torch.autograd.grad(z, leaf, u)
    return float((u * tangent).sum()), float((g * v).sum())


def product(x):
    index = torch.tensor([0, 0, 1, 1]).expand(len(x), -1)
    return torch.ones(len(x), 4).double().scatter_reduce(1, index, x, "prod", include_self=False)


def spd(x):
    factor = torch.tril(x.reshape(3, 3)) + 3 * torch.eye(3).double()
    return torch.cholesky_inverse(factor)


@pytest.mark.parametrize(
    ("f", "shape"), [(product, (2, 4)), (spd, (9,))], ids=["scatter_reduce prod", "cholesky_inverse"]
)
def test_forward_ad_is_wrong(f, shape):
    pushed, pulled = pushed_and_pulled(f, torch.randn(shape).double())
    assert abs(pushed - pulled) > 1e-3 * abs(pulled)


def test_a_padding_row_has_a_tangent_but_no_gradient():
    tokens = torch.tensor([0, 1, 0])
    pushed, pulled = pushed_and_pulled(lambda w: F.embedding(tokens, w, padding_idx=0), torch.randn(3, 2).double())
    assert abs(pushed - pulled) > 1e-3


def test_the_double_backward_of_logcumsumexp_is_zero_at_a_zero_cotangent():
    x = torch.randn(5).double().requires_grad_()
    z = torch.logcumsumexp(x, 0)
    u = torch.zeros(5).double().requires_grad_()
    (g,) = torch.autograd.grad(z, x, u, create_graph=True)
    (t,) = torch.autograd.grad(g, u, torch.ones(5).double())
    assert not t.any() or not t.isfinite().all()  # J v with v = 1 is 1 everywhere


def test_the_double_backward_of_weight_norm_is_wrong():
    v, g = torch.randn(3, 2).double().requires_grad_(), torch.randn(3, 1).double().requires_grad_()
    rate = torch.randn(3, 2).double()

    def hessian(f):
        flat = torch.cat([v.detach().reshape(-1), g.detach().reshape(-1)])
        return torch.autograd.functional.hessian(
            lambda t: (f(t[:6].reshape(3, 2), t[6:].reshape(3, 1)) * rate).sin().sum(), flat
        )

    fused, plain = (
        hessian(f) for f in (lambda v, g: torch._weight_norm(v, g, 0), lambda v, g: g * v / v.norm(dim=1, keepdim=True))
    )
    assert (fused - plain).norm() > 1e-6 * plain.norm()


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.BatchNorm1d(4)], ids=["LayerNorm", "BatchNorm in training mode"])
def test_normalisations_in_a_graph_that_is_differentiated_a_third_time_are_wrong(norm):
    norm = norm.double()
    linear = nn.Linear(3, 4).double()
    x = torch.randn(5, 3).double()

    def gradient(weight):
        point = x.clone().requires_grad_()
        energy = torch.tanh(norm(F.linear(point, weight, linear.bias))).square().sum()
        (force,) = torch.autograd.grad(energy, point, create_graph=True)
        return torch.autograd.grad(force.square().sum(), weight, create_graph=True)[0]

    weight = linear.weight.detach().clone().requires_grad_()
    v = torch.randn_like(weight)
    (product,) = torch.autograd.grad(gradient(weight), weight, v)
    h = 1e-6
    sides = [gradient((weight.detach() + s * h * v).requires_grad_()).detach() for s in (1, -1)]
    difference = (sides[0] - sides[1]) / (2 * h)
    assert (product - difference).norm() > 1e-3 * difference.norm()
