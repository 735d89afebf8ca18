"""Calls of a loss that is the user's own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curvalg.errors import LossError
from curvalg.losses.loss import Structure


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
