"""The models and data that the benchmarks run on; plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import library_models

Built = tuple[nn.Module, tuple[Tensor, Tensor]]
Group = Literal["default", "posterior", "memory", "large", "device", "library", "test"]


@dataclass(frozen=True)
class Model:
    """A row of the table of models.

    Args:
        says: what a table calls it.
        make: a model and its data, drawn from torch's global generator; the loss is the mean cross-entropy.
        group: "default" ones are in every run; "large" and "device" ones are for GPUs or patient people and run when named,
            those of "device" in ``benchmarks.device`` too. "library" ones need transformers, and run when named.
    """

    says: str
    make: Callable[[], Built]
    group: Group = "default"


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        after: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return after


class Transformer(nn.Module):
    """A language model with a learned positional table; classes on axis 1."""

    def __init__(
        self, vocabulary: int = 2000, width: int = 128, layers: int = 3, length: int = 64, heads: int = 4
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def trunk(self, tokens: Tensor) -> Tensor:
        """What the last layer is applied to, (rows, tokens, width)."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        hidden: Tensor = self.norm(self.blocks(x))
        return hidden

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(tokens))
        return logits.transpose(1, 2)


class Residual(nn.Module):
    """Two 3x3 convolutions with batch-norm around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        project = [nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*([] if same else project))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with batch-norm around a shortcut, four times as wide outside as inside."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.convolved = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        same = stride == 1 and inputs == outputs
        project = [nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*([] if same else project))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convolved(x) + self.shortcut(x))


def small_mlp() -> Built:
    """20-32-32-3 on 64 rows: what Python costs."""
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    return net, (torch.randn(64, 20), torch.randint(0, 3, (64,)))


def posterior_mlp() -> Built:
    """20-100-100-10 on 512 rows: ten outputs, and Jacobians that still fit."""
    net = nn.Sequential(nn.Linear(20, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10))
    return net, (torch.randn(512, 20), torch.randint(0, 10, (512,)))


def mlp() -> Built:
    """784-512-512-10 on 512 rows."""
    net = nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10))
    return net, (torch.randn(512, 784), torch.randint(0, 10, (512,)))


def cnn() -> Built:
    """Three 3x3 convolutions, 3-32-64-64, on 128 images of 32 x 32."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

    net = nn.Sequential(*stage(3, 32), *stage(32, 64), *stage(64, 64), nn.Flatten(), nn.Linear(1024, 10))
    return net, (torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,)))


def gpt(sequences: int = 8) -> Built:
    """Three layers of width 128, vocabulary 2000, on sequences of 64 tokens."""
    return Transformer(), (torch.randint(0, 2000, (sequences, 64)), torch.randint(0, 2000, (sequences, 64)))


def vocabulary() -> Built:
    """Three layers of width 128, a vocabulary of 50000 whose table is shared by both ends, 4 sequences of 256 tokens."""
    net = Transformer(50_000, length=256)
    net.head.weight = net.embed.weight
    return net, (torch.randint(0, 50_000, (4, 256)), torch.randint(0, 50_000, (4, 256)))


def gpt2() -> Built:
    """GPT-2's size: twelve layers of width 768, vocabulary 50257 (input and output tables apart), 8 sequences of 256."""
    vocabulary, shape = 50257, (8, 256)
    net = Transformer(vocabulary, width=768, layers=12, length=1024, heads=12)
    return net, (torch.randint(0, vocabulary, shape), torch.randint(0, vocabulary, shape))


def gpt2_tied() -> Built:
    """GPT-2 itself: 124M parameters, input and output tables shared, 4 sequences of 512."""
    vocabulary, shape = 50257, (4, 512)
    net = Transformer(vocabulary, width=768, layers=12, length=1024, heads=12)
    net.head.weight = net.embed.weight
    return net, (torch.randint(0, vocabulary, shape), torch.randint(0, vocabulary, shape))


def small_gpt() -> Built:
    """Six layers of width 256, vocabulary 512: 5M parameters on 8 sequences of 128 tokens."""
    net = Transformer(512, width=256, layers=6, length=128)
    return net, (torch.randint(0, 512, (8, 128)), torch.randint(0, 512, (8, 128)))


def resnet50() -> Built:
    """ResNet-50's size: 25.6M parameters on 32 images of 224 x 224; batch-norm by its running statistics."""
    stem = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    body, inputs = [], 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(blocks):
            body.append(Bottleneck(inputs, width, stride if number == 0 else 1))
            inputs = 4 * width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    net = nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1), *body, *head).eval()
    return net, (torch.randn(32, 3, 224, 224), torch.randint(0, 1000, (32,)))


def resnet() -> Built:
    """ResNet-18's size: 11.7M parameters on 32 images of 224 x 224; batch-norm by its running statistics."""
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    widths += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
    stem = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
    body = [Residual(*width) for width in widths]
    net = nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1), *body, *head).eval()
    return net, (torch.randn(32, 3, 224, 224), torch.randint(0, 1000, (32,)))


def tiny() -> Built:
    """4-5-3 on 16 rows: for the tests of the suite itself."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return net, (torch.randn(16, 4), torch.randint(0, 3, (16,)))


def tiny_language() -> Built:
    """One layer of width 16, vocabulary 50, 2 sequences of 8 tokens."""
    return Transformer(50, 16, 1, 8), (torch.randint(0, 50, (2, 8)), torch.randint(0, 50, (2, 8)))


def tiny_attention() -> Built:
    """One layer of width 4, vocabulary 5, 4 sequences of 3 tokens."""
    return Transformer(5, 4, 1, 3, heads=2), (torch.randint(0, 5, (4, 3)), torch.randint(0, 5, (4, 3)))


def tiny_cnn() -> Built:
    """Two convolutions, 1-2-3, on 12 images of 8 x 8."""
    stages = [nn.Conv2d(1, 2, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Conv2d(2, 3, 2), nn.Tanh()]
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(12, 3)), (
        torch.randn(12, 1, 8, 8),
        torch.randint(0, 3, (12,)),
    )


def tiny_norm() -> Built:
    """4-6-3 on 15 rows, with batch-norm by its running statistics."""
    norm = nn.BatchNorm1d(6)
    norm.running_mean, norm.running_var = torch.randn(6), torch.rand(6) + 0.5
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3)).eval(), (
        torch.randn(15, 4),
        torch.randint(0, 3, (15,)),
    )


MODELS = {
    "small MLP": Model("MLP 20-32-32-3, 64 rows", small_mlp),
    "MLP": Model("MLP 784-512-512-10, 512 rows", mlp),
    "CNN": Model("CNN 3-32-64-64, 128 images", cnn),
    "GPT": Model("GPT, 3 layers, 8 × 64 tokens", gpt),
    "MLP 13k": Model("MLP 20-100-100-10, 512 rows", posterior_mlp, "posterior"),
    "GPT 64": Model("GPT, 3 layers, 64 × 64 tokens", lambda: gpt(64), "memory"),
    "vocabulary": Model("language model, vocabulary 50k, 4 × 256 tokens", vocabulary, "memory"),
    "GPT-2": Model("GPT-2-sized, 8 × 256 tokens", gpt2, "large"),
    "ResNet": Model("ResNet-18-sized, 32 images", resnet, "large"),
    "ResNet-50": Model("ResNet-50-sized, 32 images", resnet50, "device"),
    "GPT 5M": Model("GPT, 6 layers, 8 × 128 tokens", small_gpt, "device"),
    "GPT-2 124M": Model("GPT-2, tables shared, 4 × 512 tokens", gpt2_tied, "device"),
    "HF GPT-2": Model("transformers' GPT-2, 4 layers, 8 × 32 tokens", library_models.gpt2, "library"),
    "HF Llama": Model("transformers' Llama, 4 layers, 8 × 32 tokens", library_models.llama, "library"),
    "HF BERT": Model("transformers' BERT, 4 layers, 8 × 32 tokens", library_models.bert, "library"),
    "HF T5": Model("transformers' T5, 3 + 3 layers, 8 × 32 tokens", library_models.t5, "library"),
    "HF ViT": Model("transformers' ViT, 4 layers, 16 images", library_models.vit, "library"),
    "HF GPT-2 124M": Model("transformers' GPT-2, 1 × 512 tokens", library_models.gpt2_124m, "library"),
    "tiny HF GPT-2": Model("transformers' GPT-2, 1 layer, 8 × 5 tokens", library_models.tiny_gpt2, "test"),
    "tiny HF ViT": Model("transformers' ViT, 1 layer, 8 images", library_models.tiny_vit, "test"),
    "tiny": Model("MLP 4-5-3, 16 rows", tiny, "test"),
    "tiny LM": Model("language model, vocabulary 50, 2 × 8 tokens", tiny_language, "test"),
    "tiny attention": Model("language model, vocabulary 5, 4 × 3 tokens", tiny_attention, "test"),
    "tiny CNN": Model("CNN 1-2-3, 12 images", tiny_cnn, "test"),
    "tiny norm": Model("MLP 4-6-3 with batch-norm, 15 rows", tiny_norm, "test"),
}
DEFAULT = tuple(name for name, model in MODELS.items() if model.group == "default")
