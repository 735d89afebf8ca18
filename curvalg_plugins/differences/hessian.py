"""The Hessian by central differences of gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from curvalg import Facts, GradientTerm, LossFacts, OptionError, ProblemError
from curvalg_plugins.differences.central import (
    ErrorEstimate,
    Surroundings,
    balanced,
    central,
    look_around,
    slope,
)

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import GradientField


@dataclass(frozen=True)
class HessianDifference(GradientTerm):
    r"""Hessian of the loss by differences of gradients, H v ≈ (∇L(θ + h d) − ∇L(θ − h d)) ‖v‖ / 2h with d = v / ‖v‖ (D × D).

    For models whose gradient cannot be differentiated again: fused attention, compiled programs, autograd Functions without a
    double backward. It takes first derivatives alone, four gradients a product; where there are second derivatives, ``hessian``
    is exact and costs less. The error is estimated in every product: truncation, of order h², from the steps h and 2h, and
    rounding, from the measured noise of the gradient, as noise / h. A product with a larger error than asked for is refused.

    The step is found once a state, along a random vector (a dozen gradients): it begins with ‖θ‖ (noise / ‖∇L‖)^(1/3) and is
    moved to where both errors balance; along vectors where another step is much better, it is moved again (four gradients each
    time).

    The matrix is symmetric and linear up to that error, and declared symmetric: eigsh, trace and MINRES take it, and tolerances
    below the error are not met. Where gradients jump (ReLU), a difference holds the jumps between its ends, which the Hessian,
    taken on one side of them, does not.
    Dennis and Schnabel, Numerical Methods for Unconstrained Optimization, 1983; Moré and Wild, SIAM J. Sci. Comput. 2011.

    Args:
        step: h in units of ‖θ‖; None: found as above.
        tol: estimated error above which a product is refused, as a share of its length or, where that is larger, of the length
            of products with random vectors as long; None: no estimate, two gradients a product, and nothing is refused.

    Raises:
        OptionError: a step or tolerance that is not positive.
        ProblemError: in a product whose estimated error is too large.

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> problem = Problem(net, torch.nn.MSELoss(), (torch.randn(6, 3), torch.randn(6, 1)))
    >>> v = torch.randn(21)
    >>> got, exact = (registry.build(name).lower(problem) @ v for name in ("hessian_fd", "hessian"))
    >>> bool((got - exact).norm() < 0.01 * exact.norm())
    True
    """

    step: float | None = None
    tol: float | None = 0.01
    name: ClassVar[str] = "hessian_fd"
    symbol: ClassVar[str] = r"H_{\mathrm{fd}}"

    def __post_init__(self) -> None:
        for name, value in (("step", self.step), ("tol", self.tol)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise OptionError(f"hessian_fd: {name} is a finite number above 0 or None, got {value!r}")

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(symmetric=True)

    def multiply(self, gradients: GradientField, vector: Tensor) -> Tensor:
        length = gradients.norm(vector)
        if not length:
            return vector.clone()
        around = self._surroundings(gradients)
        direction = vector / length
        if self.tol is None:
            return slope(gradients, direction, around.step).mul_(length)
        if self.step is None:
            found = balanced(gradients, direction, around.step, around.noise)
        else:
            found = central(gradients, direction, around.step, around.noise)
        size = max(gradients.norm(found.product), around.typical)
        last = ErrorEstimate(found.step / around.scale, found.truncation, found.rounding, size)
        gradients.kept["last"] = last
        if last.share > self.tol:
            raise self._refusal(last)
        return found.product.mul_(length)

    def lines(self, gradients: GradientField) -> list[str]:
        cost = (
            "2 gradients a product, without an estimate of its error (tol=None)"
            if self.tol is None
            else "4 gradients a product"
        )
        if self.tol is not None and self.step is None:
            cost += ", 4 more for each time that another step is much better"
        around: Surroundings | None = gradients.kept.get("around")
        if around is None:
            return [cost, "step and noise of the gradient are found at the first product"]
        found = "as given" if self.step is not None else "found along a random vector"
        result = [
            f"{cost}; {around.gradients} once for step and noise",
            f"step {around.step / around.scale:.2g} ‖θ‖, {found}; noise of a gradient {around.noise:.2g} in length",
        ]
        last: ErrorEstimate | None = gradients.kept.get("last")
        if last is not None:
            result.append(
                f"last product: estimated error {last}, as a share of its length or a typical one; refused above {self.tol:g}"
            )
        return result

    def _surroundings(self, gradients: GradientField) -> Surroundings:
        if "around" not in gradients.kept:
            gradients.kept["around"] = look_around(gradients, self.step)
        found: Surroundings = gradients.kept["around"]
        return found

    def _refusal(self, error: ErrorEstimate) -> ProblemError:
        other = "" if self.step is None else f"a {'smaller' if error.truncation > error.rounding else 'larger'} step=, "
        return ProblemError(
            f"hessian_fd: the estimated error of the product is {error}, as a share of its length, which is above "
            f"tol={self.tol:g}. Take {other}float64 (model.double(), and the data), or hessian, which is exact where the model "
            "has a second derivative; or allow more by tol="
        )
