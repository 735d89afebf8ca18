"""Peak memory of fresh products, net of a process that only imports, as multiples of one gradient evaluation.

Each figure is taken in a process of its own::

    python benchmarks/memory.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def measure(what: str) -> int:
    """Peak resident memory of this process in bytes after one evaluation of ``what``."""
    from curvalg import Problem, registry

    if what != "import":
        torch.manual_seed(0)
        model, data = Transformer(), (torch.randint(0, 2000, (64, 64)), torch.randint(0, 2000, (64, 64)))
        if what == "gradient":
            torch.autograd.grad(F.cross_entropy(model(data[0]), data[1]), list(model.parameters()))
        else:
            problem = Problem(model, nn.CrossEntropyLoss(), data, cache=0)
            registry.build(what).lower(problem) @ torch.randn(problem.size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print the table."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    peaks = {}
    for what in ("import", "gradient", "ggn", "hessian", "covariance", "centered_covariance"):
        run = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, check=True)
        peaks[what] = json.loads(run.stdout)
    base = peaks.pop("import")
    for what, peak in peaks.items():
        net = peak - base
        print(f"{what:20} {net / 2**20:8.0f} MiB  {net / (peaks['gradient'] - base):5.2f} gradients")


if __name__ == "__main__":
    main()
