"""Layers that trouble second derivatives: in place, fused attention, recurrent ones; operations that lack a derivative."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvalg import CurvalgError, Problem, ProblemError
from tests.support.field.models import (
    CE,
    TERMS,
    Post,
    S,
    X,
    Y,
    batches,
    lower,
    ones,
    product,
    reference,
)

# -- in-place activations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.Hardtanh, nn.LeakyReLU, nn.SiLU])
def test_inplace_relu_and_its_kin(activation, build_net, agrees):
    model = build_net(lambda: nn.Sequential(nn.Linear(3, 4), activation(inplace=True), nn.Linear(4, 3)))
    agrees(Problem(model, CE, batches()), reference(model))


def test_inplace_relu_on_the_output_and_on_a_residual_branch(build_net, agrees):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = self.a(x)
            h += x
            return F.softplus(self.b(F.relu(h, inplace=True))).add_(1).mul_(2)

    model = build_net(Block)
    agrees(Problem(model, CE, batches()), reference(model))


def test_inplace_relu_on_the_inputs_leaves_the_data_alone(build_net):
    model, x = build_net(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))), X.clone()
    try:
        product("hessian", model, CE, (x, Y), cache=0)
    except ProblemError as error:
        assert "place" in str(error)
    else:
        assert torch.equal(x, X)


# -- fused attention --------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, causal=False, mask=False, backend=None) -> None:
        super().__init__()
        self.qkv, self.head, self.causal, self.mask, self.backend = (
            nn.Linear(4, 12),
            nn.Linear(4, 3),
            causal,
            mask,
            backend,
        )

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = torch.tensor([[True, False, True]] * 3) if self.mask else None
        with sdpa_kernel(self.backend) if self.backend else nullcontext():
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": True}], ids=["full", "causal", "masked"])
def test_fused_attention_of_torch(options, build_net, agrees):
    model = build_net(Attention, **options)
    agrees(Problem(model, CE, batches(S)), reference(model, S))
    J = lower("jacobian", Problem(model, CE, batches(S)))
    assert torch.allclose(J @ ones(J), reference(model, S).jacobian.sum(1), atol=1e-12)


def test_fused_attention_chosen_by_the_model_itself_is_explained(build_net):
    """A kernel switch inside forward overrides ours: fused attention has no second derivative, and first-order matrices need none."""
    model = build_net(Attention, backend=SDPBackend.FLASH_ATTENTION)
    with pytest.raises(ProblemError, match="second derivative"):
        product("hessian", model, CE, batches(S))
    plain = build_net(Attention, backend=SDPBackend.MATH)
    plain.load_state_dict(model.state_dict())
    expected = product("ggn", plain, CE, batches(S))
    assert torch.allclose(product("ggn", model, CE, batches(S)), expected, rtol=1e-10)


class MultiHead(nn.Module):
    def __init__(self, weights) -> None:
        super().__init__()
        self.attention, self.head, self.weights = (
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 3),
            weights,
        )

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=self.weights)[0].mean(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_fused_attention_of_multihead_attention(weights, training, build_net, agrees):
    model = build_net(MultiHead, weights).train(training)
    agrees(Problem(model, CE, batches(S)), reference(model, S))


@pytest.mark.parametrize("frozen", [False, True])
def test_fused_attention_of_an_encoder_layer_in_evaluation_mode(frozen, build_net, agrees):
    """Without gradients torch takes a fast path there that nothing can differentiate."""
    model = build_net(
        lambda: nn.Sequential(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 1, enable_nested_tensor=False),
            nn.Flatten(),
            nn.Linear(12, 3),
        )
    ).eval()
    if frozen:
        model[0].requires_grad_(False)
    agrees(Problem(model, CE, batches(S)), reference(model, S), terms=("hessian", "ggn", "covariance"))


# -- recurrent layers: cuDNN's have no double backward ----------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind, **options) -> None:
        super().__init__()
        self.rnn = kind(4, 2, batch_first=True, **options)
        self.head = nn.Linear(4 if options.get("bidirectional") else 2, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}, {"proj_size": 1}], ids=str)
def test_recurrent_double_backward(options, build_net, agrees):
    model = build_net(Recurrent, nn.LSTM, **options) if "proj_size" not in options else build_net(Projected)
    flat = [id(w) for w in model.rnn._flat_weights]
    agrees(Problem(model, CE, batches(S)), reference(model, S))
    assert [id(w) for w in model.rnn._flat_weights] == flat


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 2, proj_size=1, batch_first=True), nn.Linear(1, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


# -- forward AD missing for an operation -> double backward, told by explain() ---------------------------------------------------------


class Square(torch.autograd.Function):
    """No jvp; its backward can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Squared(nn.Module):
    def __init__(self, plain=False) -> None:
        super().__init__()
        self.a, self.b, self.plain = nn.Linear(3, 4), nn.Linear(4, 3), plain

    def forward(self, x):
        h = self.a(x)
        return self.b(h * h if self.plain else Square.apply(h))


def test_forward_ad_missing_falls_back_to_double_backward(build_net, agrees, inside):
    inside(routes_after=1)
    model = build_net(Squared)
    expected = reference(build_net(Squared, plain=True))
    problem = Problem(model, CE, batches())
    agrees(problem, expected)
    op = lower("ggn", Problem(model, CE, batches()))  # forward AD is tried for single columns
    for _ in range(3):
        op @ ones(op)
    assert "no forward AD" in op.explain()
    J = lower("jacobian", problem)
    assert torch.allclose(J @ ones(J), expected.jacobian.sum(1), atol=1e-12)


@pytest.mark.parametrize("name", ["hessian", "residual"])
def test_second_derivative_missing_of_an_operation_of_torch_is_explained(name, build_net):
    model = build_net(Post, lambda z: torch.cdist(z[:, :, None], z.tanh()[:, :, None]).mean(2))
    with pytest.raises(ProblemError, match=r"lacks a second derivative.*_cdist_backward"):
        product(name, model, CE, batches())


class OnceDifferentiable(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class OnceSquared(Squared):
    def forward(self, x):
        return self.b(OnceDifferentiable.apply(self.a(x)))


@pytest.mark.parametrize("name", [*TERMS, "residual", "jacobian"])
def test_second_derivative_missing_is_explained_or_not_needed(name, build_net):
    """autograd.grad(..., inputs) never runs the node that raises for once_differentiable: the part would be dropped."""
    expected = reference(build_net(Squared, plain=True)).matrix(name).sum(1)
    try:
        got = product(name, build_net(OnceSquared), CE, batches())
    except CurvalgError as error:
        assert "second derivative" in str(error) or "twice" in str(error)
    else:
        assert torch.allclose(got, expected, atol=1e-12)
