"""Buffers, lazy modules and wrong calls; second derivatives of every layer, by differences."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from curvalg import Identity, Problem, ProblemError, registry
from tests.support.field.models import (
    CE,
    N,
    Post,
    X,
    Y,
    batches,
    clone_state,
    lower,
    mlp,
    product,
    reference,
    rng,
    same_state,
)


def test_buffers_of_convolutions_and_their_norms(build_net, agrees):
    images = torch.randn(N, 1, 4, 4, generator=rng()).double()
    model = build_net(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2),
            nn.BatchNorm2d(2),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2, 3),
        )
    )
    model(images)
    before = clone_state(model.eval())
    problem = Problem(model, CE, batches(images))
    agrees(problem, reference(model, images))
    diagonal = registry.build("covariance_diagonal").lower(problem) @ torch.ones(problem.size).double()
    assert torch.allclose(diagonal, reference(model, images).covariance.diag(), atol=1e-12)
    assert same_state(model, before)


def test_buffers_that_are_not_persistent_or_none(build_net, agrees):
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("shift", torch.ones(3), persistent=False)
            self.register_buffer("nothing", None)

        def forward(self, x):
            return self.inner(x + self.shift)

    model = build_net(Buffers)
    agrees(Problem(model, CE, batches()), reference(model))


def test_lazy_modules_are_told_to_run_once(build_net, agrees):
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3)).double()
    with pytest.raises(ProblemError, match=r"'0\.weight' is not initialised.*run the model once"):
        Problem(model, CE, batches())
    model(X)
    agrees(Problem(model, CE, batches()), reference(model))


def test_lazy_modules_beside_the_chosen_parameters_are_told_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LazyLinear(3)).double()
    with pytest.raises(ProblemError, match="not initialised"):
        product("ggn", model, CE, batches(), params=["0.*"])


@pytest.mark.parametrize(
    "data",
    [((X, X), Y), {"x": X, "labels": Y}, (X, Y)],
    ids=["two inputs as one tuple", "a keyword of another name", "too few inputs"],
)
def test_wrong_call_convention_mentions_forward(data, build_net):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, left, right):
            return self.inner(left + right)

    with pytest.raises(ProblemError, match=r"forward=lambda model, batch"):
        product("ggn", build_net(Two), CE, data)


def test_type_error_inside_forward_keeps_its_cause(build_net):
    model = build_net(Post, lambda z: z + "a")
    with pytest.raises(ProblemError, match="failed on batch 0: TypeError") as caught:
        product("ggn", model, CE, (X, Y))
    assert isinstance(caught.value.__cause__, TypeError)


def test_module_class_or_anything_else_given_for_a_model_is_explained():
    with pytest.raises(ProblemError, match=r"nn.Module|parameters"):
        Problem(nn.Linear, CE, batches())
    with pytest.raises(ProblemError, match=r"nn.Module or a function"):
        Problem("model.pt", CE, batches())


def _shape(*shape):
    return nn.Unflatten(1, shape)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


LAYERS = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "LayerNorm without weights": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "LayerNorm without bias": lambda: nn.LayerNorm(8, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "InstanceNorm": lambda: nn.Sequential(_shape(2, 4), nn.InstanceNorm1d(2, affine=True), nn.Flatten()),
    "BatchNorm": lambda: nn.BatchNorm1d(8).eval(),
    "LocalResponseNorm": lambda: nn.Sequential(_shape(8, 1), nn.LocalResponseNorm(3), nn.Flatten()),
    "normalize": lambda: Apply(lambda x: F.normalize(x, dim=1)),
    "PReLU": lambda: nn.PReLU(8),
    "GELU": lambda: nn.GELU(),
    "GELU by tanh": lambda: nn.GELU(approximate="tanh"),
    "SiLU": lambda: nn.SiLU(),
    "Mish": lambda: nn.Mish(),
    "CELU": lambda: nn.CELU(),
    "SELU": lambda: nn.SELU(),
    "Hardswish": lambda: nn.Hardswish(),
    "LogSigmoid": lambda: nn.LogSigmoid(),
    "Softplus": lambda: nn.Softplus(beta=2),
    "Softmin": lambda: nn.Softmin(1),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "GLU": lambda: nn.Sequential(nn.GLU(), nn.Linear(4, 8)),
    "MaxPool": lambda: nn.Sequential(_shape(2, 4), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 8)),
    "AdaptiveMaxPool": lambda: nn.Sequential(_shape(2, 2, 2), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2, 8)),
    "LPPool": lambda: nn.Sequential(_shape(2, 4), nn.LPPool1d(2, 2), nn.Flatten(), nn.Linear(4, 8)),
    "ConvTranspose": lambda: nn.Sequential(_shape(2, 4), nn.ConvTranspose1d(2, 2, 1), nn.Flatten()),
    "grouped Conv": lambda: nn.Sequential(_shape(2, 2, 2), nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Flatten()),
    "dilated reflecting Conv": lambda: nn.Sequential(
        _shape(2, 4), nn.Conv1d(2, 2, 3, padding=2, dilation=2, padding_mode="reflect"), nn.Flatten()
    ),
    "bilinear Upsample": lambda: nn.Sequential(_shape(2, 2, 2), nn.Upsample(2, mode="bilinear"), nn.Flatten()),
    "bicubic Upsample": lambda: nn.Sequential(
        _shape(2, 2, 2), nn.Upsample(scale_factor=2, mode="bicubic"), nn.Flatten(), nn.Linear(32, 8)
    ),
    "grid_sample": lambda: Apply(
        lambda x: F.grid_sample(x.unflatten(1, (2, 2, 2)), x.tanh().unflatten(1, (2, 2, 2)), align_corners=False).flatten(1)
    ),
    "PixelShuffle": lambda: nn.Sequential(_shape(4, 1, 2), nn.PixelShuffle(2), nn.Flatten()),
    "Unfold": lambda: nn.Sequential(_shape(2, 2, 2), nn.Unfold(2), nn.Flatten()),
    "GRUCell": lambda: nn.GRUCell(8, 8),
    "Bilinear": lambda: Apply2(nn.Bilinear(8, 8, 8)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "cosine similarity": lambda: Apply(lambda x: F.cosine_similarity(x[:, :, None], x.tanh()[:, None], dim=2)),
    "cholesky": lambda: Apply(lambda x: torch.linalg.cholesky(x[:, :, None] * x[:, None] + torch.eye(8)).sum(2)),
    "fft": lambda: Apply(lambda x: torch.fft.rfft(x).abs().repeat(1, 2)[:, :8]),
    "cumprod": lambda: Apply(lambda x: x.cumprod(1)),
    "logsumexp": lambda: Apply(lambda x: x + x.logsumexp(1, keepdim=True)),
    "variance": lambda: Apply(lambda x: x * x.std(1, keepdim=True)),
    "sort": lambda: Apply(lambda x: x.sort(1).values),
    "einsum": lambda: Apply(lambda x: torch.einsum("ni,nj->nj", x, x)),
    "complex product": lambda: Apply(lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(1, (4, 2))) ** 2).flatten(1)),
}  # fmt: skip


class Apply2(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


@pytest.mark.parametrize("layer", LAYERS)
def test_second_derivatives_of_a_layer_equal_differences_of_gradients(layer, build_net, vectors):
    """The reference uses first derivatives only, so that a wrong double backward of torch's own does not hide."""

    def make():
        middle = LAYERS[layer]()
        net = nn.Sequential(nn.Linear(3, 8), nn.Softsign(), middle, nn.Softsign(), nn.Linear(8, 3))
        net.train(middle.training)
        return net

    with torch.random.fork_rng():
        model = build_net(make)
    model[2].eval() if isinstance(model[2], nn.BatchNorm1d) else None
    problem = Problem(model, CE, batches())
    op = lower("hessian", problem)
    V = vectors(problem.size, 2)
    got = op @ V
    assert (V[:, 0] @ got[:, 1] - V[:, 1] @ got[:, 0]).abs() < 1e-9, "not symmetric"
    twin = copy.deepcopy(model)
    parameters = list(twin.parameters())

    def gradient(shift):
        for p, q, part in zip(
            parameters, model.parameters(), shift.split([p.numel() for p in parameters]), strict=True
        ):
            p.data = q.data + part.reshape(p.shape)
        gradients = torch.autograd.grad(CE(twin(X), Y), parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in gradients])

    h = 1e-5
    for v, product_ in zip(V.T, got.T, strict=True):
        expected = (gradient(h * v) - gradient(-h * v)) / (2 * h)
        assert (product_ - expected).norm() < 1e-6 * expected.norm()
    assert torch.allclose(problem.gradient(), gradient(torch.zeros(problem.size).double()), atol=1e-12)
    jacobian = lower("jacobian", problem)
    W = torch.randn(jacobian.shape[0], generator=torch.Generator().manual_seed(0)).double()
    left, right = W @ (jacobian @ V[:, 0]), V[:, 0] @ (jacobian.T @ W)
    assert (left - right).abs() < 1e-9 * (1 + left.abs())


def test_shifted_sums_of_a_troublesome_model(build_net, vectors):
    """Several troubles at once: tied weights, in-place ReLU, frozen dropout, ragged batches, a compiled part."""

    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop, self.head = nn.Linear(3, 3), nn.Dropout(0.3), nn.Linear(3, 3)

        def forward(self, x):
            h = F.relu(self.layer(x), inplace=True)
            return self.head(self.drop(torch.tanh(self.layer(h))))

    model = build_net(Everything).train()
    model.head.compile(backend="aot_eager")
    problem = Problem(model, CE, batches(), randomness="frozen")
    expr = registry.build("hessian") - 2 * registry.build("centered_covariance") + 0.1 * Identity
    op = expr.lower(problem)
    V = vectors(problem.size)
    parts = lower("hessian", problem) @ V - 2 * (lower("centered_covariance", problem) @ V) + 0.1 * V
    for _ in range(3):
        assert torch.allclose(op @ V, parts, atol=1e-12)
    dense = op.to_dense()
    assert torch.allclose(dense, dense.T, atol=1e-12)


@pytest.mark.parametrize("cache", ["auto", 0])
@pytest.mark.parametrize("functional", [False, True])
def test_the_padding_row_of_an_embedding_is_a_constant(functional, cache):
    """Forward AD gives it a tangent although its gradient is zero: kept and fresh products were different matrices."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(6, 3, padding_idx=2), nn.Linear(3, 4)

        def forward(self, x):
            e = nn.functional.embedding(x, self.table.weight, padding_idx=-4) if functional else self.table(x)
            return self.head(torch.tanh(e + 1).sum(1))

    x = torch.tensor([[2, 2, 1], [0, 2, 5], [3, 4, 2]])
    problem = Problem(Tokens().double(), nn.CrossEntropyLoss(), (x, torch.tensor([0, 1, 3])), cache=cache)
    build = registry.build
    for name in ("ggn", "hessian", "covariance"):
        op = build(name).lower(problem)
        rows = torch.stack([op @ e for e in torch.eye(problem.size).double()])
        assert torch.allclose(rows, rows.T, atol=1e-12)
        assert rows[6:9].norm() == 0
    assert build("jacobian").lower(problem).to_dense()[:, 6:9].norm() == 0


def test_a_parameter_without_axes():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x):
            return torch.tanh(self.w * x)

    problem = Problem(Gate(), nn.MSELoss(), (torch.ones(4, 2).double(), torch.zeros(4, 2).double()))
    product = registry.build("hessian").lower(problem) @ {"w": torch.tensor(1.0).double()}
    assert product["w"].shape == ()
    assert problem.layout.unflatten(problem.gradient())["w"].shape == ()
