"""Dense matrices of a drawn problem by torch.autograd alone, on the whole data in one batch."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.support.fuzz.grammar import Drawn


class Reference:
    """What curvalg must give.

    Args:
        drawn: the problem.
    """

    def __init__(self, drawn: Drawn) -> None:
        self.drawn = drawn
        self.params = list(drawn.model.parameters())
        self.x, self.y = drawn.whole
        self.z = drawn.model(self.x)

    def _flat(self, gradients: tuple[Tensor | None, ...]) -> Tensor:
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(gradients, self.params)]
        )

    def _gradient(self, value: Tensor, *, graph: bool = False) -> Tensor:
        return self._flat(
            torch.autograd.grad(value, self.params, create_graph=graph, retain_graph=True, allow_unused=True)
        )

    @cached_property
    def total(self) -> Tensor:
        """L(θ)."""
        return self.drawn.loss(self.z, self.y)

    @cached_property
    def gradient(self) -> Tensor:
        """∇L."""
        return self._gradient(self.total).detach()

    @cached_property
    def jacobian(self) -> Tensor:
        """(outputs, D)."""
        return torch.stack([self._gradient(e) for e in self.z.reshape(-1)]).detach()

    @cached_property
    def output_gradient(self) -> Tensor:
        """∂L/∂z, (n, C)."""
        z = self.z.detach().requires_grad_()
        return torch.autograd.grad(self.drawn.loss(z, self.y), z)[0]

    @cached_property
    def output_hessian(self) -> Tensor:
        """∂²L/∂z², (outputs, outputs)."""
        shape = self.z.shape
        flat = self.z.detach().reshape(-1)
        return torch.autograd.functional.hessian(lambda t: self.drawn.loss(t.reshape(shape), self.y), flat)

    @cached_property
    def hessian(self) -> Tensor:
        """By central differences of the gradient: no second derivative of torch's is trusted."""
        flat = torch.cat([p.detach().reshape(-1) for p in self.params])
        h, columns = 1e-5, []
        for i in range(len(flat)):
            sides = []
            for sign in (1, -1):
                self._set(flat, i, sign * h)
                z = self.drawn.model(self.x)
                sides.append(
                    self._flat(torch.autograd.grad(self.drawn.loss(z, self.y), self.params, allow_unused=True))
                )
            columns.append((sides[0] - sides[1]) / (2 * h))
        self._set(flat, 0, 0.0)
        return torch.stack(columns, 1)

    def _set(self, flat: Tensor, place: int, step: float) -> None:
        moved = flat.clone()
        moved[place] += step
        with torch.no_grad():
            for p, part in zip(self.params, moved.split([p.numel() for p in self.params])):
                p.copy_(part.reshape(p.shape))

    @cached_property
    def autograd_hessian(self) -> Tensor:
        """By double backward; NaN where an operation has none."""
        try:
            with sdpa_kernel(SDPBackend.MATH):
                total = self.drawn.loss(self.drawn.model(self.x), self.y)
            g = self._gradient(total, graph=True)
            if not g.requires_grad:
                return torch.zeros(len(g), len(g)).double()
            return torch.stack([self._gradient(e) for e in g]).detach()
        except (RuntimeError, NotImplementedError):
            size = sum(p.numel() for p in self.params)
            return torch.full((size, size), torch.nan).double()

    @cached_property
    def ggn(self) -> Tensor:
        """Jᵀ B J."""
        return self.jacobian.T @ self.output_hessian @ self.jacobian

    @cached_property
    def count(self) -> int:
        """N."""
        return int(self.drawn.used.sum())

    @cached_property
    def rows(self) -> Tensor:
        """∇cₙ of every row (n, D)."""
        J = self.jacobian.reshape(*self.z.shape, -1)
        return torch.einsum("nc,ncd->nd", self.output_gradient, J)

    @cached_property
    def covariance(self) -> Tensor:
        """s Σ ∇c ∇cᵀ."""
        scale = self.count if self.drawn.reduction == "mean" else 1
        return scale * self.rows.T @ self.rows

    @cached_property
    def centered_covariance(self) -> Tensor:
        """s Σ ∇c ∇cᵀ − (s/N) ∇L ∇Lᵀ."""
        scale = self.count if self.drawn.reduction == "mean" else 1
        return self.covariance - scale / self.count * torch.outer(self.gradient, self.gradient)
