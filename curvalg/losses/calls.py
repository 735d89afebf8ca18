"""Calls of a loss that is the user's own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from curvalg.errors import LossError
from curvalg.losses.loss import Structure


@dataclass(frozen=True)
class OutputAlone:
    """A function of the output alone as one of (output, target), which does not look at the target.

    Args:
        fn: the function.
    """

    fn: Callable[[Any], Tensor]

    @property
    def __name__(self) -> str:
        return name_of(self.fn)

    def __call__(self, output: Structure, target: Structure) -> Tensor:
        return self.fn(output)


def takes_output_alone(fn: object) -> bool:
    """Whether something is a function, or a module, that can be called with one argument and not with two."""
    if isinstance(fn, type) or not callable(fn):
        return False
    try:
        signature = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn)
    except (TypeError, ValueError):  # one of torch's own that says nothing of its arguments
        return False
    return _binds(signature, 1) and not _binds(signature, 2)


def _binds(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def name_of(fn: Callable[..., Any]) -> str:
    """The name of a callable in messages."""
    return getattr(fn, "__name__", type(fn).__name__)


def call(fn: Callable[..., Any], output: Structure, target: Structure) -> Any:
    """The value of ``fn(output, target)``.

    Raises:
        LossError: it takes other arguments.
    """
    try:
        return fn(output, target)
    except TypeError as error:
        raise LossError(
            f"{name_of(fn)}: expected a callable (output, target) -> scalar, but the call failed: {error}. For a loss with "
            "more arguments pass lambda output, target: ..., and have Problem's forward= and target= bring what it reads"
        ) from error
