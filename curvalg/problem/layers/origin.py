"""How a tensor came from a parameter: by functions that only pick and arrange its entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class PathStep:
    """One function on the way from a parameter: linear, and each number of its result is one of its argument.

    Args:
        label: the function and its arguments; steps with equal labels are equal.
        function: the function.
    """

    label: str
    function: Callable[[Tensor], Tensor] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Origin:
    """A parameter and the steps from it to a tensor (a transpose, rows of a packed weight).

    Args:
        name: of the parameter.
        steps: in the order in which they were taken.
    """

    name: str
    steps: tuple[PathStep, ...] = ()

    def then(self, step: PathStep) -> Origin:
        """The origin of what one more step gives."""
        return Origin(self.name, (*self.steps, step))

    def followed_by(self, other: Origin) -> Origin:
        """The origin of what came from this tensor as another one did from its parameter."""
        return Origin(self.name, (*self.steps, *other.steps))

    def of(self, parameter: Tensor) -> Tensor:
        """The tensor that comes from a parameter."""
        for step in self.steps:
            parameter = step.function(parameter)
        return parameter

    def shape(self, parameter: torch.Size) -> torch.Size:
        """The shape of the tensor, from that of the parameter."""
        return self.of(torch.empty(parameter, device="meta")).shape if self.steps else parameter

    def push(self, parameters: Tensor) -> Tensor:
        """The tensors that come from parameters (P, *shape)."""
        return torch.func.vmap(self.of)(parameters) if self.steps else parameters

    def pull(self, cotangents: Tensor, parameter: torch.Size) -> Tensor:
        """The adjoint of :meth:`push`: each number goes back to the entry it came from; all other entries are zero.

        Args:
            cotangents: (P, *shape of the tensor).
            parameter: shape of the parameter.

        Returns:
            Shape (P, *parameter).
        """
        if not self.steps:
            return cotangents
        pull: Callable[[Tensor], tuple[Tensor]]
        _, pull = torch.func.vjp(self.of, cotangents.new_zeros(parameter))  # type: ignore[misc]
        pulled: Tensor = torch.func.vmap(lambda cotangent: pull(cotangent)[0])(cotangents)
        return pulled

    def entries(self, parameter: torch.Size, device: torch.device) -> Tensor:
        """The number, in the flattened parameter, of each entry of the tensor."""
        return self.of(torch.arange(parameter.numel(), device=device).reshape(parameter))
