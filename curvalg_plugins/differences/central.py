"""Central differences of gradients along unit vectors, with an estimate of both their errors, and steps that balance these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import GradientField

LARGEST = 0.1
"""The largest step that is chosen, in units of ‖θ‖."""
WORTH = 4.0
"""How many times smaller the error has to become for a difference to be taken again with another step."""
TRIES = 4
"""Differences along one vector, with a step each, before the best of them is taken."""
DROWNED = 0.25
"""Truncation as a share of rounding below which it is rounding itself that is seen of it, so that larger steps are tried."""
GROWTH = 10.0
"""How many times larger."""
SAMPLES = 2
"""Gradients that the noise is measured by."""


@dataclass(frozen=True)
class Difference:
    """A central difference along a unit vector, and an estimate of its error; lengths of vectors.

    Args:
        product: (∇L(θ + h v̂) − ∇L(θ − h v̂)) / 2h, shape (D,).
        step: h.
        truncation: a third of its distance from the difference with the step 2h: the h² of its error (Richardson).
        rounding: the noise of a gradient over h.
    """

    product: Tensor
    step: float
    truncation: float
    rounding: float

    @property
    def error(self) -> float:
        """The estimate of the whole error."""
        return self.truncation + self.rounding

    @property
    def better(self) -> float:
        """The step that makes both errors together least: that of truncation · x² + rounding / x, x in units of this step."""
        return self.step * math.cbrt(self.rounding / (2 * self.truncation)) if self.truncation else self.step

    def at(self, step: float) -> float:
        """What the error would be with another step."""
        x = step / self.step
        return self.truncation * x**2 + self.rounding / x


def slope(gradients: GradientField, direction: Tensor, step: float) -> Tensor:
    """The central difference along a unit vector, (D,); two gradients."""
    moved = direction * step
    ahead = gradients.at(gradients.parameters.add_(moved))
    return ahead.sub(gradients.at(gradients.parameters.sub_(moved))).div_(2 * step)


def central(gradients: GradientField, direction: Tensor, step: float, noise: float) -> Difference:
    """The central difference along a unit vector with the estimate of its error; four gradients.

    Args:
        gradients: of the loss.
        direction: v̂, shape (D,).
        step: h.
        noise: length of the error of a gradient.
    """
    near, far = (slope(gradients, direction, h) for h in (step, 2 * step))
    return Difference(near, step, gradients.norm(far.sub_(near)) / 3, noise / step)


def balanced(gradients: GradientField, direction: Tensor, first: float, noise: float) -> Difference:
    """The central difference along a unit vector, with a smaller step where that makes its error much smaller.

    Args:
        gradients: of the loss.
        direction: v̂, shape (D,).
        first: the step to begin with.
        noise: length of the error of a gradient.
    """
    best = central(gradients, direction, first, noise)
    for _ in range(TRIES - 1):
        if best.at(best.better) * WORTH > best.error:
            break
        found = central(gradients, direction, best.better, noise)
        if found.error >= best.error:
            break
        best = found
    return best


def lengthened(gradients: GradientField, direction: Tensor, best: Difference, most: float, noise: float) -> Difference:
    """The difference along the same unit vector, with a larger step where the truncation drowns in rounding.

    Args:
        gradients: of the loss.
        direction: v̂, shape (D,).
        best: the difference so far.
        most: the largest step.
        noise: length of the error of a gradient.
    """
    while best.truncation <= DROWNED * best.rounding and best.step < most:
        found = central(gradients, direction, min(GROWTH * best.step, most), noise)
        if found.error >= best.error:
            break
        best = found
    return best


@dataclass(frozen=True)
class ErrorEstimate:
    """The error of a product with a unit vector as it was estimated.

    Args:
        step: h in units of ‖θ‖.
        truncation, rounding: lengths of the parts of the error.
        size: what it is a share of: the length of the product, or that of one with a random unit vector if that is larger.
    """

    step: float
    truncation: float
    rounding: float
    size: float

    @property
    def share(self) -> float:
        """The whole error as a share."""
        error = self.truncation + self.rounding
        if not error:
            return 0.0
        return error / self.size if self.size else math.inf

    def __str__(self) -> str:
        parts = f"truncation {self._shown(self.truncation)}, rounding {self._shown(self.rounding)}"
        return f"{self._shown(self.truncation + self.rounding)} ({parts}) at the step {self.step:.2g} ‖θ‖"

    def _shown(self, part: float) -> str:
        return f"{part / self.size:.1e}" if self.size else f"{part:.1e} of zero"


@dataclass(frozen=True)
class Surroundings:
    """What is found out once a state: the noise of gradients, and the sizes that steps and products are measured by.

    Args:
        scale: ‖θ‖, or 1 where all parameters are zero.
        noise: length of the error of a gradient, its own and that of rounding its parameters.
        step: h to begin with.
        typical: length of the product with a random unit vector: about ‖H‖_F / √D.
        gradients: how many were taken for this.
    """

    scale: float
    noise: float
    step: float
    typical: float
    gradients: int


def look_around(gradients: GradientField, given: float | None) -> Surroundings:
    """Measure noise, step and typical size at a state.

    Args:
        gradients: of the loss.
        given: the step in units of ‖θ‖; None: the cube-root rule.
    """
    scale = gradients.norm(gradients.parameters) or 1.0
    noise = _noise(gradients)
    direction = gradients.random(SAMPLES)
    direction /= gradients.norm(direction)
    if given is not None:
        found = central(gradients, direction, given * scale, noise)
    else:
        relative = noise / (gradients.norm(gradients.here) or noise or 1.0)
        first = min(math.cbrt(relative) or LARGEST, LARGEST)
        found = balanced(gradients, direction, first * scale, noise)
        found = lengthened(gradients, direction, found, LARGEST * scale, noise)
    return Surroundings(scale, noise, found.step, gradients.norm(found.product), gradients.gradients)


def _noise(gradients: GradientField) -> float:
    """The most that the gradient changes where every parameter moves by its last bit, up or down; never below its own last bit.

    This is what arithmetic does to it, and what rounding the parameters of a difference does.
    """
    epsilon, here = gradients.epsilon, gradients.here
    least, found = epsilon * gradients.norm(here), 0.0
    for seed in range(SAMPLES):
        moved = gradients.parameters
        moved += gradients.random(seed).sign_() * moved.abs() * epsilon
        found = max(found, gradients.norm(gradients.at(moved).sub(here)))
    return max(found, least)
