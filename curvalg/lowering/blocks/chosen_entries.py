"""Entries of parameters on a problem: their rows among those of their parameters, and the layout of what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvalg.errors import ExpressionError, ProblemError
from curvalg.expr.entries import Choice, Entries, entries_of
from curvalg.problem import Layout, Problem
from curvalg.problem.model import parameters as params_


@dataclass(frozen=True)
class ChosenEntries:
    """Entries on a problem.

    Args:
        among: the number of rows of the parameters that they are of.
        rows: their places (k,) among these rows, ascending, on the device of the problem.
        layout: of vectors (k,): the chosen numbers of each parameter; in its own shape where all are.
    """

    among: int
    rows: Tensor
    layout: Layout

    @property
    def size(self) -> int:
        """The number of entries, k."""
        return self.layout.size

    def take(self, x: Tensor) -> Tensor:
        """The chosen rows of x, shape (k, ...)."""
        return x[self.rows]

    def put(self, whole: Tensor, rows: Tensor) -> None:
        """Write rows to their places in the whole."""
        whole[self.rows] = rows


def choose_entries(problem: Problem, entries: Entries) -> ChosenEntries:
    """The entries on a problem over their parameters, or over more.

    Raises:
        ProblemError: a name that matches nothing, a mask of another shape, a number that is out of range, a parameter twice.
        ExpressionError: parameters are sharded.
    """
    if problem.group.sharded:
        raise ExpressionError(
            f"sub-matrices over {entries} are not offered where parameters are sharded; make the Problem of a whole model on "
            "every process (group= without shard=) where it fits"
        )
    of: dict[str, Choice] = {}
    for pattern, choice in entries.choices.items():
        names = params_.match([pattern], problem.layout.names)
        if choice is not ... and len(names) > 1:
            raise ProblemError(
                f"{pattern!r} matches several parameters ({', '.join(names)}), but masks, integers and slices are "
                "of one; name it"
            )
        if twice := [name for name in names if name in of]:
            raise ProblemError(f"entries of {twice[0]!r} are chosen twice; give each parameter once")
        of |= dict.fromkeys(names, choice)
    layout, places, start = problem.layout, [], 0
    kept: dict[str, Tensor] = {}
    for name in (name for name in layout.names if name in of):
        shape, dtype = layout.shapes[name], layout.dtypes[name]
        numbers = _numbers(name, of[name], tuple(shape))
        places.append(start + numbers)
        kept[name] = torch.empty(shape if of[name] is ... else (len(numbers),), dtype=dtype, device="meta")
        start += shape.numel()
    rows = torch.from_numpy(np.concatenate(places)).to(problem.device)
    return ChosenEntries(start, rows, Layout(kept))


def _numbers(name: str, choice: Choice, shape: tuple[int, ...]) -> Any:
    """The chosen places in a flattened parameter."""
    every = np.arange(int(np.prod(shape, dtype=np.int64)))
    if choice is ...:
        return every
    if isinstance(choice, slice):
        if not len(found := every[choice]):
            raise ProblemError(f"entries of {name!r}: {choice} chooses nothing of {len(every)} numbers")
        return found
    assert isinstance(choice, np.ndarray)
    if choice.dtype == bool:
        if choice.shape != shape:
            raise ProblemError(f"entries of {name!r}: a mask has the parameter's shape {shape}, got {choice.shape}")
        return np.flatnonzero(choice)
    if choice[-1] >= len(every):
        raise ProblemError(f"entries of {name!r}: {choice[-1]} is out of range, the parameter has {len(every)} numbers")
    return choice


def part_layout(problem: Problem, params: Sequence[str] | None) -> Layout:
    """The layout of vectors over all parameters of a problem (None), over some of them, or over some entries."""
    if params is None:
        return problem.layout
    if (entries := entries_of(params)) is not None:
        return choose_entries(problem, entries).layout
    return problem.restricted(params).layout
