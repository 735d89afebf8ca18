"""Dense reference matrices, built with torch.func alone: nothing of curvalg is used here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass
class Case:
    """A model with data and a loss written twice: as a user gives it, and as numerators of every sample.

    Args:
        model: the user's module.
        loss: what a user passes to Problem.
        batches: list of (inputs, target).
        numerators: (raw output, target) -> the summands of the loss, one per sample, without a denominator.
        denominator: of the whole data set; None for a sum loss.
        count: N; None: the number of numerators that are not identically zero.
        options: further arguments of Problem.
    """

    model: nn.Module
    loss: Any
    batches: list[tuple[Any, Any]]
    numerators: Callable[[Any, Any], Tensor]
    denominator: float | None
    count: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    names: list[str] | None = None


class Dense:
    """Dense matrices of a case, in float64, for the parameters in ``names`` (default: those that require gradients)."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = copy.deepcopy(case.model)
        named = dict(self.model.named_parameters())
        self.names = case.names or [n for n, p in named.items() if p.requires_grad]
        self.shapes = [named[n].shape for n in self.names]
        self.theta = torch.cat([named[n].detach().reshape(-1) for n in self.names])
        self.D = len(self.theta)
        with sdpa_kernel(SDPBackend.MATH):
            self._build()

    def _split(self, theta: Tensor) -> dict[str, Tensor]:
        parts = theta.split([s.numel() for s in self.shapes])
        return {n: t.reshape(s) for n, s, t in zip(self.names, self.shapes, parts, strict=True)}

    def _output(self, inputs: Any) -> Callable[[Tensor], Any]:
        def run(theta: Tensor) -> Any:
            model = copy.deepcopy(self.model)  # buffers and tied slots of a shared copy would leak between calls
            return functional_call(model, self._split(theta), (inputs,))

        return run

    def _build(self) -> None:
        share = 1.0 / (self.case.denominator or 1.0)
        D = self.D
        self.hessian, self.ggn = torch.zeros(D, D).double(), torch.zeros(D, D).double()
        jacobians, blocks, rows = [], [], []
        for inputs, target in self.case.batches:
            run = self._output(inputs)
            raw = run(self.theta)

            def joined(theta: Tensor, run: Any = run) -> Tensor:
                return flatten(run(theta))

            def shares(z: Tensor, raw: Any = raw, target: Any = target) -> Tensor:
                return share * self.case.numerators(unflatten(z, raw), target)

            J = jacobian(joined, self.theta)
            B = hessian(lambda z, shares=shares: shares(z).sum(), flatten(raw).detach())
            self.ggn += J.T @ B @ J
            self.hessian += hessian(lambda t, joined=joined, shares=shares: shares(joined(t)).sum(), self.theta)
            rows.append(jacobian(lambda z, shares=shares: shares(z), flatten(raw).detach()) @ J)
            jacobians.append(J)
            blocks.append(B)
        self.jacobian = torch.cat(jacobians)
        self.loss_hessian = torch.block_diag(*blocks)
        g = torch.cat(rows)
        self.rows = g
        count = self.case.count if self.case.count is not None else len(g)
        s = count if self.case.denominator is not None else 1
        self.gradient = g.sum(0)
        self.covariance = s * g.T @ g
        self.centered_covariance = self.covariance - s / count * torch.outer(self.gradient, self.gradient)
        self.residual = self.hessian - self.ggn

    def matrix(self, name: str) -> Tensor:
        """The matrix of a registered term."""
        return getattr(self, name)


def flatten(raw: Any) -> Tensor:
    """Outputs as one vector, several concatenated row by row."""
    if isinstance(raw, Tensor):
        return raw.reshape(-1)
    leaves = list(raw.values()) if isinstance(raw, dict) else list(raw)
    return torch.cat([t.reshape(t.shape[0], -1) for t in leaves], 1).reshape(-1)


def unflatten(z: Tensor, raw: Any) -> Any:
    """The inverse of :func:`flatten`."""
    if isinstance(raw, Tensor):
        return z.reshape(raw.shape)
    leaves = list(raw.values()) if isinstance(raw, dict) else list(raw)
    n = leaves[0].shape[0]
    parts = z.reshape(n, -1).split([t[0].numel() for t in leaves], 1)
    parts = [p.reshape(t.shape) for p, t in zip(parts, leaves, strict=True)]
    return dict(zip(raw, parts, strict=True)) if isinstance(raw, dict) else tuple(parts)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Row by row in reverse mode, which every model here supports."""
    y, pull = vjp(f, x)
    return torch.stack([pull(e)[0] for e in torch.eye(len(y), dtype=y.dtype)]).detach()


def hessian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Reverse over reverse, one row at a time."""
    gradient, pull = vjp(grad(f), x)
    return torch.stack([pull(e)[0] for e in torch.eye(len(gradient), dtype=x.dtype)]).detach()
