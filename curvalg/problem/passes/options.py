"""The options of a problem: their values, and which are offered where parameters are sharded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal, TypeVar

from curvalg.errors import ProblemError
from curvalg.losses import CallableLoss
from curvalg.losses.calls import OutputAlone, takes_output_alone
from curvalg.problem.data.batches import Data

T = TypeVar("T")

LEFT = {
    "cache": "auto",
    "columns": "auto",
    "factored": "auto",
    "output_memory": "auto",
    "compiler": None,
    "capture": "auto",
}
"""Options that are not offered, and what they are where they are not given."""
NAMES = {"compiler": "compile", "capture": "graphs"}
"""What the user calls them."""


def read_for(loss: Any, data: Any, target: Callable[[Any], Any] | None) -> Data:
    """The data, read as a loss needs them: with targets, or inputs alone where it does not look at any.

    Raises:
        ProblemError: data that cannot be used, or inputs alone where the loss needs targets.
    """
    given = getattr(loss, "_orig_mod", loss)  # a compiled module does not say what its forward takes
    alone = takes_output_alone(given) or (isinstance(given, CallableLoss) and isinstance(given.fn, OutputAlone))
    return Data(data, target, needs_target=loss is not None and not alone, inputs_alone=alone)


def settle_options(problem: Any) -> None:
    """Nothing is kept, timed or tried by one process alone: each batch is recorded in every product, one column at a time.

    Raises:
        ProblemError: an option that is not offered for sharded parameters.
    """
    for name, default in LEFT.items():
        given = getattr(problem, "_output_memory" if name == "output_memory" else name)
        if given != default and not (name == "columns" and given == "loop") and not (name == "cache" and given == 0):
            raise ProblemError(
                f"{NAMES.get(name, name)}={given!r} is not offered for sharded parameters, where nothing is kept between "
                "products and columns are multiplied one after the other; leave it out"
            )
    if problem.draws.mode == "frozen":
        raise ProblemError(
            "randomness='frozen' is not offered for sharded parameters; call model.eval() on all ranks, and leave it out"
        )
    problem.cache, problem.columns, problem.output_memory = 0, "loop", float("inf")
    problem.factored, problem.verify = False, False


def require_parts(problem: Any, whole: bool) -> None:
    """Raise unless each process has a part of the data, where parameters are sharded.

    Raises:
        ProblemError: every process has all of them.
    """
    if whole and problem.group.sharded:
        raise ProblemError(
            "whole=True is not offered where parameters are sharded: each call of the model needs all processes, each with "
            "batches of its own; deal the data out (curvalg.distributed.shard)"
        )


def one_of(name: str, value: object, allowed: Sequence[T]) -> T:
    """The value of an option, which must be one of a few.

    Raises:
        ProblemError: it is none of them.
    """
    for known in allowed:
        if value == known:
            return known
    raise ProblemError(f"{name} is one of {list(allowed)}, got {value!r}")


def output_bytes(value: Literal["auto"] | float) -> Literal["auto"] | float:
    """The value of ``output_memory=``.

    Raises:
        ProblemError: it is no number of bytes.
    """
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, Real) or not value >= 0:
        raise ProblemError(f"output_memory is 'auto' or a number of bytes ≥ 0, got {value!r}")
    return float(value)
