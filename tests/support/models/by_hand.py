"""Losses, Hessians, Gauss-Newton matrices and covariances of real models by plain torch, one backward pass after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from curvalg import Problem


class InDouble(TorchFunctionMode):
    """Computes in float64 what asks for float32: libraries cast losses, norms and angles to it, from either side."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return function(*args, **kwargs)


def in_double(model: nn.Module) -> nn.Module:
    """A model in evaluation mode whose parameters, and everything in its forward, are in float64."""
    inner = model.eval().double().forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        with InDouble():
            return inner(*args, **kwargs)

    model.forward = forward
    return model


@dataclass
class Real:
    """A model of a real library, its batches, and what they mean.

    Args:
        model: with the parameters that are to be chosen requiring gradients.
        batches: as the library gives them.
        problem: makes the problem of model and batches.
        loss: batch -> the library's own mean loss.
        output: batch -> z, rows first.
        row_losses: (z, batch) -> the sum of the losses of each row, shape (n,).
        count: batch -> what the mean divides by.
    """

    model: nn.Module
    batches: list[Any]
    problem: Callable[..., Problem]
    loss: Callable[[Any], Tensor]
    output: Callable[[Any], Tensor]
    row_losses: Callable[[Tensor, Any], Tensor]
    count: Callable[[Any], int]
    parameters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.total = sum(map(self.count, self.batches))

    def flat(self, tensors: list[Tensor | None]) -> Tensor:
        return torch.cat([(p * 0 if t is None else t).flatten() for p, t in zip(self.parameters, tensors, strict=True)])

    def pulled(self, scalar: Tensor, **options: Any) -> Tensor:
        """The gradient of a scalar, (D,)."""
        return self.flat(torch.autograd.grad(scalar, self.parameters, allow_unused=True, **options))

    @property
    def twice(self):
        """The context in which attention can be differentiated twice."""
        return sdpa_kernel(SDPBackend.MATH)

    def mean(self, batch: Any) -> Tensor:
        """The share of a batch in the loss of all, by the library's own."""
        return self.loss(batch) * self.count(batch) / self.total

    def value(self) -> float:
        return sum(self.mean(batch).item() for batch in self.batches)

    def hessian(self, v: Tensor) -> Tensor:
        """∇²L v by two backward passes through the library's loss."""
        with self.twice:
            return sum(self.pulled(self.pulled(self.mean(b), create_graph=True) @ v).detach() for b in self.batches)

    def ggn(self, v: Tensor) -> Tensor:
        """Σ Jᵀ B J v, with J v from the derivative of Jᵀu by u."""
        product = torch.zeros_like(v)
        with self.twice:
            for batch in self.batches:
                z = self.output(batch)
                u = torch.zeros_like(z, requires_grad=True)
                (tangent,) = torch.autograd.grad(self.pulled((z * u).sum(), create_graph=True) @ v, u)
                leaf = z.detach().requires_grad_()
                loss = self.row_losses(leaf, batch).sum() / self.total
                (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
                (curved,) = torch.autograd.grad((gradient * tangent.detach()).sum(), leaf)
                product += self.pulled((self.output(batch) * curved).sum()).detach()
        return product

    def covariance(self, v: Tensor) -> Tensor:
        """N Σ g gᵀ v over rows that count."""
        rows = []
        for batch in self.batches:
            losses = self.row_losses(self.output(batch), batch) / self.total
            rows += [self.pulled(loss, retain_graph=True).detach() for loss in losses]
        return len(rows) * sum(g * (g @ v) for g in rows)
