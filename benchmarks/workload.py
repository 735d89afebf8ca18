"""What all contestants of a task are given: a model, data, vectors, and the sizes of the question."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.effort import Sizes
from benchmarks.models import MODELS

Batches = list[tuple[Tensor, Tensor]]

WIDEST = 8192
"""Inputs or outputs of a layer whose Kronecker factors are still taken."""


DRAWS = 100
"""Draws from a posterior."""


@dataclass(frozen=True)
class Workload:
    """One model with its data, on one device.

    Args:
        name: of the model, as in ``MODELS``.
        model: nobody may change it; who must takes :meth:`twin`.
        loss: the mean cross-entropy.
        data: batches of pairs.
        vectors: (D,), or (D, K) for several columns.
        sizes: of questions that are more than a product.
        closing: callbacks that run when the task is over.
    """

    name: str
    model: nn.Module
    loss: nn.Module
    data: Batches
    vectors: Tensor
    sizes: Sizes
    closing: ExitStack = field(default_factory=ExitStack)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In the order of the model."""
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        """D, the number of parameters."""
        return self.vectors.shape[0]

    @property
    def rows(self) -> int:
        """Of all batches together."""
        return sum(X.shape[0] for X, _ in self.data)

    @property
    def vector(self) -> Tensor:
        """(D,), the first column."""
        return self.vectors if self.vectors.ndim == 1 else self.vectors[:, 0]

    @property
    def affine(self) -> dict[str, nn.Parameter]:
        """Parameters of linear and convolution layers, by name: those that every library has Kronecker factors for.

        Without layers so wide that their factors are larger than the model, as that of a vocabulary.
        """
        found = {}
        for name, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and max(weight.shape[0], weight[0].numel()) <= WIDEST:
                found |= {f"{name}.{key}": p for key, p in module.named_parameters(recurse=False)}
        return {name: p for name, p in self.model.named_parameters() if name in found}

    @property
    def affine_vectors(self) -> Tensor:
        """The first rows of the vectors, as many as :attr:`affine` has elements."""
        return self.vectors[: sum(p.numel() for p in self.affine.values())]

    def twin(self) -> nn.Module:
        """A copy of the model for a library that leaves something on it; its gradients go when the task is over."""
        twin = copy.deepcopy(self.model)
        # A gradient that was recorded holds its parameter and is held by it, which no collector sees.
        self.closing.callback(twin.zero_grad, set_to_none=True)
        return twin


def build(name: str, sizes: Sizes, device: str = "cpu", columns: int = 1, batches: int = 1) -> Workload:
    """The same model, data and vectors whoever asks, in whatever process.

    Args:
        name: a key of ``MODELS``.
        sizes: of questions that are more than a product.
        device: "cpu" or "cuda".
        columns: K.
        batches: the data are split into so many.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, (X, y) = MODELS[name].make()
        size = sum(p.numel() for p in model.parameters())
        vectors = torch.randn(size, columns) if columns > 1 else torch.randn(size)
    data = [(x.to(device), t.to(device)) for x, t in zip(X.tensor_split(batches), y.tensor_split(batches))]
    return Workload(name, model.to(device), nn.CrossEntropyLoss(), data, vectors.to(device), sizes)


@contextmanager
def fair_attention() -> Iterator[None]:
    """The attention kernel that has second derivatives, for all: most peers differentiate through it as they find it."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
