"""Queries of ``curvalg influence``: a problem of their own, or data for the model and loss of the training samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvalg.cli.made_problems.load import made, source_of
from curvalg.cli.made_problems.remake import Changes, cast_data, remade
from curvalg.problem import Problem

_EXPECTED = "expected data (a tuple (X, y), a list of batches or a loader), a curvalg.Problem, or a function of either"


def load_queries(
    name: str, problem: Problem, arguments: Mapping[str, Any], changes: Changes, group: Any = None
) -> Problem:
    """The problem whose samples ask.

    Args:
        name: as of :func:`~curvalg.cli.made_problems.load.load_problem`; of data, of a
            Problem, or of a function that returns either.
        problem: of the training samples, whose model and loss data are for.
        arguments: of the function, by name.
        changes: of the training samples' problem; they hold for the queries as well.
        group: the process group that shares the problem; None: one process.

    Raises:
        ProblemError: a name that leads nowhere, a function that fails, or what is neither data nor a problem.
    """
    source = source_of(name, _EXPECTED)
    is_data = not callable(source) and not isinstance(source, Problem)
    found = source if is_data else made(name, source, group, arguments, expected=_EXPECTED)
    if isinstance(found, Problem):
        return remade(found, changes, group)
    return problem.with_data(cast_data(found, changes.dtype))
