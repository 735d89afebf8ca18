"""Losses that are sums over elements: B is diagonal, every element of the output is a position."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from curvalg.losses.loss import Loss, LossPoint, Structure
from curvalg.losses.validation import check_nonnegative, floating, real_target, same_shape


class ElementwiseLoss(Loss):
    """A loss Σ_i w_i ℓ(z_i, t_i). A subclass gives its total and the first and second derivative of ℓ."""

    @abstractmethod
    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """Σ w ℓ, a scalar."""

    @abstractmethod
    def first(self, output: Tensor, target: Tensor) -> Tensor:
        """The first derivative ∂ℓ/∂z of every element."""

    @abstractmethod
    def second(self, output: Tensor, target: Tensor) -> Tensor:
        """The second derivative ∂²ℓ/∂z² of every element."""

    def information(self, output: Tensor, target: Tensor) -> Tensor:
        """The Fisher information E (∂ℓ/∂z)² of every element under the likelihood at the output."""
        return self.second(output, target)

    def check_values(self, output: Tensor, target: Tensor) -> None:
        """Raise LossError for entries out of range; nothing by default."""

    def weights(self, target: Structure) -> Tensor:
        """The weight w of every element of the target: one by default."""
        tensor = real_target(self.name, target)
        dtype = tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()
        return torch.ones((), dtype=dtype, device=tensor.device).expand(tensor.shape)

    def denominator(self, target: Structure) -> float:
        """The number of elements."""
        return float(real_target(self.name, target).numel())

    def numerator(self, output: Structure, target: Structure) -> Tensor:
        return self.total(output, real_target(self.name, target).to(output.dtype))

    def at(self, output: Structure, target: Structure) -> ElementwisePoint:
        """The loss at an output and a target of the same shape."""
        output = floating(self.name, output)
        target = real_target(self.name, target)
        same_shape(self.name, output, target)
        target = target.to(output.dtype)
        self.check_values(output, target)
        return ElementwisePoint(self, output, target)


class ElementwisePoint(LossPoint[Tensor]):
    """An elementwise loss at one output and target of the same shape."""

    labels = None

    def __init__(self, loss: ElementwiseLoss, output: Tensor, target: Tensor) -> None:
        self.loss, self.output, self.target = loss, output, target
        self.facts = loss.facts
        self.weights = loss.weights(target).to(output)
        self.noise_shape = tuple(output.shape)
        self.curvature = self.weights * loss.second(output, target)

    def value(self) -> Tensor:
        return self.loss.total(self.output, self.target).detach()

    def gradient(self) -> Tensor:
        """The gradient w ∂ℓ/∂z."""
        return self.weights * self.loss.first(self.output, self.target)

    def hvp(self, tangent: Tensor) -> Tensor:
        """The product w ∂²ℓ/∂z² ∘ t."""
        return self.curvature * tangent

    def fisher_hvp(self, tangent: Tensor) -> Tensor:
        """w E (∂ℓ/∂z)² ∘ t."""
        return self._information() * tangent

    def factor(self) -> Tensor:
        """The single column √B."""
        return self._root(self.curvature).unsqueeze(0)

    def pseudo_gradients(self, uniform: Tensor, *, fisher: bool = False) -> Tensor:
        """±√B, or ±√Fisher, with a random sign for every element."""
        self.require_noise(uniform)
        root = self._root(self._information() if fisher else self.curvature)
        return torch.where(uniform < 0.5, -root, root)

    def _information(self) -> Tensor:
        self.require_likelihood()
        return self.weights * self.loss.information(self.output, self.target)

    def _root(self, diagonal: Tensor) -> Tensor:
        check_nonnegative(self.facts.name, diagonal, "use weights that are not negative")
        return diagonal.sqrt()
