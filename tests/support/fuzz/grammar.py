"""Random models, losses and data from a grammar. Nothing here knows curvalg."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

Shape = tuple[int, ...]
"""Of one row: (d,), (T, d) or (c, h, w)."""


class Apply(nn.Module):
    """A function of the input, with modules of its own."""

    def __init__(self, name: str, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.name, self.function, self.parts = name, function, nn.ModuleDict(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **self.parts) if len(self.parts) else self.function(x)

    def extra_repr(self) -> str:
        return self.name


class WithParameters(nn.Module):
    """A function of the input and of parameters that belong to no layer."""

    def __init__(self, name: str, function: Callable[..., Tensor], *shapes: Shape) -> None:
        super().__init__()
        self.name, self.function = name, function
        self.given = nn.ParameterList([nn.Parameter(0.5 * torch.randn(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.given)

    def extra_repr(self) -> str:
        return self.name


Made = tuple[nn.Module, Shape]
Rule = Callable[[random.Random, Shape], Made | None]
"""(draws, shape of a row) -> a module and the shape it gives; None where it does not fit."""


def _last(shape: Shape, size: int) -> Shape:
    return (*shape[:-1], size)


def _width(r: random.Random) -> int:
    return r.choice([2, 3, 4])


def linear(r: random.Random, s: Shape) -> Made:
    n = _width(r)
    return nn.Linear(s[-1], n, bias=r.random() < 0.8), _last(s, n)


def activation(r: random.Random, s: Shape) -> Made:
    kinds: list[Callable[[], nn.Module]] = [
        nn.Tanh, nn.Sigmoid, nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.SELU, nn.Mish, nn.Softsign, nn.LeakyReLU,
        nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.CELU, nn.PReLU, nn.Tanhshrink, nn.Softshrink, nn.ReLU6, nn.Hardsigmoid,
        lambda: nn.Softmax(-1), lambda: nn.LogSoftmax(-1), lambda: nn.ReLU(inplace=True),
    ]  # fmt: skip
    return r.choice(kinds)(), s


def elementwise(r: random.Random, s: Shape) -> Made:
    name, f = r.choice(
        [
            ("sin", torch.sin),
            ("square", lambda x: x.square()),
            ("clamp", lambda x: x.clamp(-0.5, 0.7)),
            ("where", lambda x: torch.where(x > 0, x, 0.1 * x.exp())),
            ("cumsum", lambda x: x.cumsum(-1)),
            ("flip", lambda x: x.flip(-1)),
            ("roll", lambda x: x.roll(1, -1)),
            ("sort", lambda x: x.sort(-1).values),
            ("normalise", lambda x: x / (1 + x.norm(dim=-1, keepdim=True))),
            ("logsumexp", lambda x: x - x.logsumexp(-1, keepdim=True)),
            ("logcumsumexp", lambda x: torch.logcumsumexp(x, -1)),
            ("cumprod", lambda x: (1 + 0.3 * x).cumprod(-1)),
            ("in place", lambda x: x.clone().mul_(2).add_(0.1)),
            ("max", lambda x: torch.maximum(x, x.flip(-1))),
            ("atan2", lambda x: torch.atan2(x, 1 + x.square())),
            ("index", lambda x: x[..., [0] * x.shape[-1]] + x),
            (
                "scatter product",
                lambda x: torch.ones_like(x).scatter_reduce(-1, torch.zeros_like(x).long(), x.sigmoid(), "prod"),
            ),
            ("func", lambda x: torch.func.vmap(torch.func.grad(lambda t: t.square().sum().sin()))(x)),
        ]
    )
    return Apply(name, f), s


def normalisation(r: random.Random, s: Shape) -> Made | None:
    kind = r.choice(["layer", "rms", "batch", "group", "instance"])
    if kind in ("layer", "rms"):
        return (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(s[-1], elementwise_affine=r.random() < 0.8), s
    if kind == "batch" and len(s) in (1, 3):
        module = (nn.BatchNorm1d if len(s) == 1 else nn.BatchNorm2d)(s[0])
        module.running_mean.uniform_(-1, 1)
        module.running_var.uniform_(0.5, 2)
        return module.eval(), s
    if kind == "group" and len(s) == 3 and s[0] % 2 == 0:
        return nn.GroupNorm(2, s[0]), s
    if kind == "instance" and len(s) == 3 and s[1] * s[2] > 1:
        return nn.InstanceNorm2d(s[0], affine=True), s
    return None


def used_otherwise(r: random.Random, s: Shape) -> Made | None:
    """Weights outside of layers, shared, tied, or reached in several ways."""
    d, n = s[-1], _width(r)
    kinds: list[Callable[[], Made]] = [
        lambda: (WithParameters("x @ W", lambda x, w: x @ w, (d, n)), _last(s, n)),
        lambda: (WithParameters("x @ W.T", lambda x, w: x @ w.T, (n, d)), _last(s, n)),
        lambda: (WithParameters("einsum", lambda x, w: torch.einsum("...i,io->...o", x, w), (d, n)), _last(s, n)),
        lambda: (WithParameters("scale and shift", lambda x, a, b: x * a + b, (d,), (d,)), s),
        lambda: (WithParameters("one scale", lambda x, a: x * a, (1,)), s),
        lambda: (WithParameters("b - x", lambda x, b: b - x, (d,)), s),
        lambda: (WithParameters("tied", lambda x, w: torch.tanh(x @ w) @ w.T, (d, n)), s),
        lambda: (WithParameters("row of W", lambda x, w: x * w[0] + w.sum(), (2, d)), s),
        lambda: (WithParameters("addmm", lambda x, w, b: torch.addmm(b, x.reshape(-1, d), w).view(*x.shape[:-1], n), (d, n), (n,)), _last(s, n)),
        lambda: (Apply("reused", lambda x, f: f(torch.tanh(f(x))), f=nn.Linear(d, d)), s),
        lambda: (Apply("residual", lambda x, f: x + f(x), f=nn.Sequential(nn.Linear(d, n), nn.Tanh(), nn.Linear(n, d))), s),
        lambda: (Apply("gated", lambda x, f, g: f(x) * torch.sigmoid(g(x)), f=nn.Linear(d, n), g=nn.Linear(d, n)), _last(s, n)),
        lambda: (Apply("weight norm", lambda x, f: f(x), f=parametrizations.weight_norm(nn.Linear(d, n))), _last(s, n)),
        lambda: (Apply("bilinear", lambda x, f: f(x, x), f=nn.Bilinear(d, d, n)), _last(s, n)),
        lambda: (Apply("unused", lambda x, f: x, f=nn.Linear(d, 2)), s),
        lambda: (Apply("view trick", lambda x, f: f(x.reshape(-1, d)).reshape(*x.shape[:-1], n), f=nn.Linear(d, n)), _last(s, n)),
    ]  # fmt: skip
    if d % 2 == 0:
        kinds.append(lambda: (nn.GLU(), _last(s, d // 2)))
    return r.choice(kinds)()


class Routed(nn.Module):
    """Rows go to experts by the sign of their first number."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__()
        self.experts, self.n = nn.ModuleList([nn.Linear(d, n), nn.Linear(d, n)]), n

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()
        out = x.new_zeros(len(x), self.n)
        for k, expert in enumerate(self.experts):
            if (chosen == k).any():
                out[chosen == k] = expert(x[chosen == k])
        return out


def routed(r: random.Random, s: Shape) -> Made | None:
    n = _width(r)
    return (Routed(s[0], n), (n,)) if len(s) == 1 else None


class Last(nn.Module):
    """A recurrent network's outputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Attends(nn.Module):
    def __init__(self, d: int, fused: bool) -> None:
        super().__init__()
        self.qkv, self.fused = nn.Linear(d, 3 * d), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def sequence(r: random.Random, s: Shape) -> Made | None:
    if len(s) != 2:
        return None
    t, d = s
    n = _width(r)
    kinds: list[Callable[[], Made]] = [
        lambda: (Attends(d, r.random() < 0.5), s),
        lambda: (Last(nn.LSTM(d, n, batch_first=True)), (t, n)),
        lambda: (Last(nn.GRU(d, n, batch_first=True)), (t, n)),
        lambda: (Last(nn.RNN(d, n, batch_first=True)), (t, n)),
        lambda: (Apply("multihead", lambda x, f: f(x, x, x)[0], f=nn.MultiheadAttention(d, 1, batch_first=True)), s),
        lambda: (nn.TransformerEncoderLayer(d, 1, 4, dropout=0.0, batch_first=True).eval(), s),
        lambda: (Apply("conv1d", lambda x, f: f(x.mT).mT, f=nn.Conv1d(d, n, 3, padding=1)), (t, n)),
        lambda: (WithParameters("positions", lambda x, p: x + p, (1, t, d)), s),
        lambda: (Apply("mean", lambda x: x.mean(1)), (d,)),
        lambda: (Apply("maximum", lambda x: x.amax(1)), (d,)),
        lambda: (Apply("last", lambda x: x[:, -1]), (d,)),
        lambda: (Apply("flatten", lambda x: x.flatten(1)), (t * d,)),
    ]
    return r.choice(kinds)()


def image(r: random.Random, s: Shape) -> Made | None:
    if len(s) != 3:
        return None
    c, h, w = s
    n = _width(r)
    kinds: list[Callable[[], Made]] = [
        lambda: (nn.Conv2d(c, n, 3, padding=1, bias=r.random() < 0.7), (n, h, w)),
        lambda: (nn.Conv2d(c, c, 1, groups=c), s),
        lambda: (nn.Conv2d(c, n, 2, dilation=1, padding="same"), (n, h, w)),
        lambda: (nn.ConvTranspose2d(c, n, 3, padding=1), (n, h, w)),
        lambda: (Apply("flatten", lambda x: x.flatten(1)), (c * h * w,)),
        lambda: (Apply("global average", lambda x: x.mean((2, 3))), (c,)),
        lambda: (Apply("permute", lambda x: x.flatten(2).mT), (h * w, c)),
    ]
    if h % 2 == 0 and w % 2 == 0:
        kinds += [lambda: (nn.MaxPool2d(2), (c, h // 2, w // 2)), lambda: (nn.AvgPool2d(2), (c, h // 2, w // 2))]
    return r.choice(kinds)()


RULES: list[Rule] = [linear, linear, activation, activation, elementwise, normalisation, used_otherwise, used_otherwise, routed, sequence, sequence, image, image]  # fmt: skip


@dataclass
class Drawn:
    """A random problem.

    Args:
        model: in float64; its rows are computed alone.
        loss: as a user passes it.
        batches: ragged; may hold an empty one.
        reduction: of the loss.
        used: rows whose share is not zero.
        options: of the problem that the loss needs.
    """

    model: nn.Module
    loss: Any
    batches: list[tuple[Tensor, Tensor]]
    reduction: str
    used: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        """All rows in one batch."""
        xs, ys = zip(*self.batches)
        return torch.cat(xs), torch.cat(ys)


def _start(r: random.Random, n: int) -> tuple[Tensor, list[nn.Module], Shape]:
    kind = r.choice(["vector", "vector", "sequence", "tokens", "image"])
    if kind == "vector":
        d = r.choice([2, 3, 4])
        return torch.randn(n, d), [], (d,)
    if kind == "sequence":
        return torch.randn(n, 3, 2), [], (3, 2)
    if kind == "tokens":
        padding = r.choice([None, 0])
        return torch.randint(0, 5, (n, 3)), [nn.Embedding(5, 2, padding_idx=padding)], (3, 2)
    return torch.randn(n, 2, 4, 4), [], (2, 4, 4)


def draw(seed: int) -> Drawn:
    """The problem of a seed."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    n = r.randint(3, 7)
    x, layers, shape = _start(r, n)
    for _ in range(r.randint(1, 5)):
        made = r.choice(RULES)(r, shape)
        if made is not None and math.prod(made[1]) <= 40:
            layers.append(made[0])
            shape = made[1]
    if len(shape) > 1:
        layers.append(nn.Flatten())
        shape = (math.prod(shape),)
    outputs = r.choice([1, 2, 3])
    layers.append(nn.Linear(shape[0], outputs))
    model = nn.Sequential(*layers).double()
    x = x.double() if x.is_floating_point() else x
    loss, y, used, reduction, options = _loss(r, n, outputs)
    cuts = sorted(r.sample(range(1, n), r.randint(0, min(2, n - 1))))
    bounds = list(zip([0, *cuts], [*cuts, n], strict=True))
    batches = [(x[a:b], y[a:b]) for a, b in bounds]
    if r.random() < 0.1:
        batches.insert(r.randrange(len(batches) + 1), (x[:0], y[:0]))
    return Drawn(model, loss, batches, reduction, used, options)


def _power(o: Tensor, t: Tensor) -> Tensor:
    return (o - t).pow(4).sum()


def _loss(r: random.Random, n: int, outputs: int) -> tuple[Any, Tensor, Tensor, str, dict[str, Any]]:
    reduction = r.choice(["mean", "sum"])
    every = torch.ones(n, dtype=torch.bool)
    kind = r.choice(["ce", "ce", "soft", "mse", "huber", "smooth", "bce", "poisson", "callable", "function"])
    if kind in ("ce", "function") and outputs > 1:
        y = torch.randint(0, outputs, (n,))
        weight = 0.5 + torch.rand(outputs).double() if r.random() < 0.5 else None
        smoothing = r.choice([0.0, 0.2])
        if r.random() < 0.3:
            y[r.randrange(n)] = -100
            if (y == -100).all():
                y[0] = 0
        if kind == "function":
            return (
                functools.partial(F.cross_entropy, weight=weight, label_smoothing=smoothing, reduction=reduction),
                y,
                y != -100,
                reduction,
                {},
            )
        return (
            nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing, reduction=reduction),
            y,
            y != -100,
            reduction,
            {},
        )
    if kind == "soft" and outputs > 1:
        return (
            nn.CrossEntropyLoss(reduction=reduction),
            torch.rand(n, outputs).softmax(1).double(),
            every,
            reduction,
            {},
        )
    if kind == "huber":
        return nn.HuberLoss(delta=0.7, reduction=reduction), torch.randn(n, outputs).double(), every, reduction, {}
    if kind == "smooth":
        return nn.SmoothL1Loss(beta=0.6, reduction=reduction), torch.randn(n, outputs).double(), every, reduction, {}
    if kind == "bce":
        weight = 0.5 + torch.rand(outputs).double() if r.random() < 0.5 else None
        return (
            nn.BCEWithLogitsLoss(pos_weight=weight, reduction=reduction),
            torch.rand(n, outputs).double(),
            every,
            reduction,
            {},
        )
    if kind == "poisson":
        return nn.PoissonNLLLoss(reduction=reduction), torch.randint(0, 4, (n, outputs)).double(), every, reduction, {}
    if kind == "callable":
        return _power, torch.randn(n, outputs).double(), every, "sum", {"reduction": "sum"}
    return nn.MSELoss(reduction=reduction), torch.randn(n, outputs).double(), every, reduction, {}
