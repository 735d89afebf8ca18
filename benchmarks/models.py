"""The models and data that the benchmarks run on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = tuple[nn.Module, tuple[Tensor, Tensor]]


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
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small language model with a learned positional table; classes on axis 1."""

    def __init__(self, vocabulary: int = 2000, width: int = 128, layers: int = 3, length: int = 64) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def small_mlp() -> Case:
    """20-32-32-3 on 64 rows: what Python costs."""
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    return net, (torch.randn(64, 20), torch.randint(0, 3, (64,)))


def mlp() -> Case:
    """784-512-512-10 on 512 rows."""
    net = nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10))
    return net, (torch.randn(512, 784), torch.randint(0, 10, (512,)))


def cnn() -> Case:
    """Three 3x3 convolutions, 3-32-64-64, on 128 images of 32 x 32."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

    net = nn.Sequential(*stage(3, 32), *stage(32, 64), *stage(64, 64), nn.Flatten(), nn.Linear(1024, 10))
    return net, (torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,)))


def gpt() -> Case:
    """Three layers of width 128, vocabulary 2000, on 8 sequences of 64 tokens."""
    return Transformer(), (torch.randint(0, 2000, (8, 64)), torch.randint(0, 2000, (8, 64)))


MODELS = {"small MLP": small_mlp, "MLP": mlp, "CNN": cnn, "GPT": gpt}
