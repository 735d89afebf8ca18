"""Functions of the eigenvalues of an operator, by name or given; their domains, and what to do outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvalg.errors import ExpressionError, FactsError, OptionError


@dataclass(frozen=True)
class Scalar:
    """A real function of a real number.

    Args:
        name: for messages and checkpoints.
        apply: entry by entry, float64.
        least: the lower end of its domain; −∞ for none.
        open: whether the end is excluded.
        cure: what to do outside.
    """

    name: str
    apply: Callable[[Tensor], Tensor]
    least: float = -torch.inf
    open: bool = False
    cure: str = "choose a function that is finite on the whole spectrum, or add a shift, + c * Identity"

    def at(self, values: Tensor, operator: str, eps: float) -> Tensor:
        """Values f of Ritz values or eigenvalues; those that rounding put below the domain are taken to its end.

        Args:
            values: float64.
            operator: its name, for messages.
            eps: rounding unit of its products.

        Raises:
            FactsError: a value outside the domain, or an f(value) that is not finite.
            ExpressionError: a function that does not give one number for each.
        """
        lowest = float(values.min())
        noise = 100 * eps * float(values.abs().max())
        if lowest < self.least - noise or (self.open and lowest <= self.least + noise / 100):
            kind = "positive" if self.open else "nonnegative"
            shift = self.least - lowest + 10 * noise
            raise FactsError(
                f"{self.name} needs {kind} eigenvalues, but {operator} has the Ritz value {lowest:.6g}; {self.cure} with "
                f"c > {shift:.3g}"
            )
        result = self.apply(values.clamp_min(self.least))
        if not isinstance(result, Tensor) or result.shape != values.shape:
            came = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ExpressionError(f"expected a function of a tensor, entry by entry, but {self.name} gave {came}")
        if not bool(torch.isfinite(result).all()):
            where = float(values[~torch.isfinite(result)][0])
            raise FactsError(f"{self.name} of {operator} is not finite at the Ritz value {where:.6g}; {self.cure}")
        return result.to(torch.float64)


_SHIFT = "take a term that is positive semidefinite, such as ggn, or add a shift, + c * Identity"
_DAMPING = "add damping, + c * Identity"

NAMED: dict[str, Scalar] = {
    "sqrt": Scalar("sqrt", torch.sqrt, 0.0, False, _SHIFT),
    "inv_sqrt": Scalar("inv_sqrt", torch.rsqrt, 0.0, True, _DAMPING),
    "exp": Scalar("exp", torch.exp, cure="scale the operator down"),
    "log": Scalar("log", torch.log, 0.0, True, _DAMPING),
}


def scalar(function: Any) -> Scalar:
    """A scalar function by its name, or the given one.

    Raises:
        ExpressionError: neither.
    """
    if isinstance(function, str) and function in NAMED:
        return NAMED[function]
    if callable(function):
        return Scalar(getattr(function, "__name__", type(function).__name__), function)
    raise OptionError(
        f"expected one of {', '.join(map(repr, NAMED))} or a function of a tensor of eigenvalues, got {function!r}"
    )
