"""Kernels of layers whose columns travel to other processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curvalg import Problem, registry
from tests.support.rank_quantities import SPLITS


class Attention(nn.Module):
    """Attention, whose weights of queries, keys and values are rows of one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.out = (
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.LayerNorm(4),
            nn.Linear(4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.inner(x, x, x, need_weights=False)[0])).sum(1)


class Transposed(nn.Module):
    """A weight that is used transposed, and a contraction of several axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nti,tio->no", torch.tanh(x @ self.first), self.second)


MODELS = {
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    ),
    "transposed convolution": lambda: nn.Sequential(
        nn.ConvTranspose1d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(10, 2)
    ),
    "attention": Attention,
    "transposed": Transposed,
}


def kernel(name: str, own: slice = slice(None), group: Any = None) -> Tensor:
    """The kernel of a model on some of the batches, or on those of all processes of a group."""
    torch.manual_seed(0)
    net = MODELS[name]().double()
    batches = [(torch.randn(n, 3, 4).double(), torch.randn(n, 2).double()) for n in (2, 1, 3, 2, 1)]
    return registry.build("ntk").lower(Problem(net, nn.MSELoss(), batches[own], group=group)).to_dense()


def kernel_of_processes(group: Any, name: str) -> Tensor:
    """The kernel of a model on several processes, with uneven parts of the batches."""
    import torch.distributed as dist

    return kernel(name, slice(*SPLITS[dist.get_world_size(group)][dist.get_rank(group)]), group)
