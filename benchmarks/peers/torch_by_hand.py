"""What one writes by hand: double backward, and the GGN by a forward and a reverse derivative. Also the referee."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import Transformer
from benchmarks.peers.base import Peer, Run, answers, looped
from benchmarks.questions import CHUNK
from benchmarks.workload import Workload


class TorchByHand(Peer):
    """Textbook code on torch alone."""

    name = "torch by hand"
    distribution = "torch"
    many_columns = False
    only = ("products", "memory")

    @answers("gradient")
    def gradient(self, workload: Workload, question: str) -> Run:
        """Over all batches."""

        def run() -> Tensor:
            return sum(_flat(torch.autograd.grad(share, workload.parameters)) for share in _shares(workload))  # type: ignore[return-value]

        return run

    @answers("chunked gradient")
    def chunked_gradient(self, workload: Workload, question: str) -> Run | None:
        """As one trains a language model whose outputs would not fit: the last layer a few positions at a time."""
        model = workload.model  # no twin, which would count as memory
        workload.closing.callback(model.zero_grad, set_to_none=True)
        if not isinstance(model, Transformer):
            return None

        def run() -> Tensor:
            model.zero_grad()
            for tokens, targets in workload.data:
                h = model.trunk(tokens)
                leaf = h.detach().flatten(0, 1).requires_grad_()
                for part, labels in zip(leaf.split(CHUNK), targets.flatten().split(CHUNK), strict=True):
                    loss = F.cross_entropy(model.head(part), labels, reduction="sum")
                    (loss / (workload.rows * targets.shape[1])).backward()
                assert leaf.grad is not None
                h.backward(leaf.grad.reshape(h.shape))
            assert model.head.weight.grad is not None
            return model.head.weight.grad

        return run

    @answers("hessian")
    def hessian(self, workload: Workload, question: str) -> Run:
        """By double backward."""
        parameters = workload.parameters

        def multiply(v: Tensor) -> Tensor:
            total = torch.zeros_like(v)
            for share in _shares(workload):
                gradient = _flat(torch.autograd.grad(share, parameters, create_graph=True))
                total += _flat(torch.autograd.grad(gradient, parameters, v))
            return total

        return lambda: looped(multiply, workload.vectors)

    @answers("ggn")
    def ggn(self, workload: Workload, question: str) -> Run:
        """Jᵀ B J v, with J v by two reverse passes (forward mode does not know every layer)."""
        parameters = workload.parameters

        def multiply(v: Tensor) -> Tensor:
            total = torch.zeros_like(v)
            for X, y in workload.data:
                output = workload.model(X)
                seed = torch.zeros_like(output, requires_grad=True)
                pulled = _flat(torch.autograd.grad(output, parameters, seed, create_graph=True))
                (tangent,) = torch.autograd.grad(pulled, seed, v)
                leaf = output.detach().requires_grad_()
                share = workload.loss(leaf, y) * (X.shape[0] / workload.rows)
                (slope,) = torch.autograd.grad(share, leaf, create_graph=True)
                (bent,) = torch.autograd.grad(slope, leaf, tangent)
                total += _flat(torch.autograd.grad(output, parameters, bent))
            return total

        return lambda: looped(multiply, workload.vectors)


def _shares(workload: Workload) -> Iterator[Tensor]:
    """Of each batch in the mean over all rows."""
    for X, y in workload.data:
        yield workload.loss(workload.model(X), y) * (X.shape[0] / workload.rows)


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
