"""Small models of every kind that users bring, each with ragged batches and a dense-reference description."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.dense import Case


def _ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def _mse(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().reshape(len(y), -1).sum(1)


def _ragged(X: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    cuts = [0, 2, 5, len(X)]
    return [(X[a:b], y[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def _classify(model: nn.Module, X: Tensor, classes: int = 3, **kwargs: object) -> Case:
    y = torch.randint(0, classes, (len(X),))
    return Case(model.double(), nn.CrossEntropyLoss(), _ragged(X, y), _ce, float(len(X)), **kwargs)  # type: ignore[arg-type]


def _regress(model: nn.Module, X: Tensor, *shape: int) -> Case:
    y = torch.randn(len(X), *shape).double()
    return Case(model.double(), nn.MSELoss(), _ragged(X, y), _mse, float(y.numel()))


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape).double()


def linear() -> Case:
    return _regress(nn.Linear(3, 2), _x(7, 3), 2)


def mlp() -> Case:
    return _classify(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), _x(7, 4))


def cnn() -> Case:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(3, 3)
    )
    return _classify(net, _x(7, 1, 6, 6))


class Attention(nn.Module):
    """Pre-norm self-attention; by hand or by the fused kernel."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.head = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 3)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        else:
            scores = q @ k.transpose(-1, -2) / 2
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
            mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return self.head((x + self.out(mixed)).mean(1))


def attention_softmax() -> Case:
    return _classify(Attention(False), _x(7, 3, 4))


def attention_fused() -> Case:
    return _classify(Attention(True), _x(7, 3, 4))


def encoder_layer() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, activation="gelu").eval()
    return _classify(nn.Sequential(layer, nn.Flatten(), nn.Linear(8, 3)), _x(7, 2, 4))


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last step."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def lstm() -> Case:
    return _classify(Recurrent(nn.LSTM), _x(7, 3, 3))


def gru() -> Case:
    return _classify(Recurrent(nn.GRU), _x(7, 3, 3))


def _batchnorm() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for _ in range(3):
            net(_x(8, 4))
    return net


def batchnorm_eval() -> Case:
    return _classify(_batchnorm().eval(), _x(7, 4))


def batchnorm_training() -> Case:
    return _classify(_batchnorm().train(), _x(7, 4))


class Tied(nn.Module):
    """Token embedding tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(tokens)))).transpose(1, 2)


def _tokens(model: nn.Module, loss: object, axis: int) -> Case:
    X, y = torch.randint(0, 5, (7, 3)), torch.randint(0, 5, (7, 3))

    def numerators(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.movedim(axis, 1), y, reduction="none").sum(1)

    return Case(model.double(), loss, _ragged(X, y), numerators, float(y.numel()))


def tied_embedding() -> Case:
    return _tokens(Tied(), nn.CrossEntropyLoss(), 1)


class Sequence(nn.Module):
    """Per-position classes, with the class axis last or second."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.embed, self.out, self.axis = nn.Embedding(5, 3), nn.Linear(3, 5), axis

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(tokens).cumsum(1))).movedim(-1, self.axis)


def sequence_classes_last() -> Case:
    from curvalg.losses import CrossEntropy

    return _tokens(Sequence(-1), CrossEntropy(class_axis=-1), -1)


def sequence_classes_second() -> Case:
    return _tokens(Sequence(1), nn.CrossEntropyLoss(), 1)


def two_names() -> Case:
    shared = nn.Linear(4, 4)
    return _classify(nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(4, 3)), _x(7, 4))


class Reused(nn.Module):
    """A weight used by its layer and once more through F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(torch.tanh(self.layer(x)), self.layer.weight.T))


def reused_weight() -> Case:
    return _classify(Reused(), _x(7, 4))


class Partial(nn.Module):
    """A frozen layer and one that the output does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.unused, self.head = nn.Linear(4, 4), nn.Linear(2, 2), nn.Linear(4, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.frozen(x)))


def frozen_and_unused() -> Case:
    return _classify(Partial(), _x(7, 4))


def inplace_activation() -> Case:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ELU(inplace=True), nn.Linear(4, 3))
    return _classify(net, _x(7, 4))


class Residual(nn.Module):
    """Two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.a(x))
        return self.head(x + torch.sigmoid(self.b(x)))


def residual() -> Case:
    return _classify(Residual(), _x(7, 4))


class TwoHeads(nn.Module):
    """A tuple of outputs of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.gate = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.mean(h), self.gate(h)


def _two_heads_loss(z: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return _two_heads_rows(z, y).mean()


def _two_heads_rows(z: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return ((z[0] - y).square() * torch.exp(z[1])).sum(1) - z[1][:, 0]


def several_outputs() -> Case:
    X, y = _x(7, 3), _x(7, 2)
    return Case(TwoHeads().double(), _two_heads_loss, _ragged(X, y), _two_heads_rows, 7.0)


class MeanVariance(nn.Module):
    """A mean and a positive variance."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.var = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.mean(h), F.softplus(self.var(h)) + 0.1


def gaussian_nll() -> Case:
    X, y = _x(7, 3), _x(7, 2)

    def rows(z: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return (0.5 * (z[1].log() + (z[0] - y).square() / z[1])).sum(1)

    return Case(MeanVariance().double(), nn.GaussianNLLLoss(), _ragged(X, y), rows, float(y.numel()))


ZOO = {
    f.__name__: f
    for f in (
        linear,
        mlp,
        cnn,
        attention_softmax,
        attention_fused,
        encoder_layer,
        lstm,
        gru,
        batchnorm_eval,
        batchnorm_training,
        tied_embedding,
        sequence_classes_last,
        sequence_classes_second,
        two_names,
        reused_weight,
        frozen_and_unused,
        inplace_activation,
        residual,
        several_outputs,
        gaussian_nll,
    )
}


def make(name: str, seed: int = 0) -> Case:
    """A case of the zoo with fixed random weights and data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ZOO[name]()
