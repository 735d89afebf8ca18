"""Problems of ``--problem``: a built-in one by name, or the user's own from a module or a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvalg.cli.made_problems.arguments import accepted
from curvalg.cli.made_problems.find_object import find_object, guess, is_named, shown
from curvalg.cli.made_problems.list_problems import BUILT_IN
from curvalg.distributed.making import process_group
from curvalg.errors import CurvalgError, ProblemError
from curvalg.problem import Problem

_EXPECTED = "expected a function that returns a curvalg.Problem (its arguments come from --arg), or a Problem"
_SHARED = (
    "def make(group=None): ... return Problem(model, loss, shard(dataset, batch_size=64, group=group), group=group), with "
    "shard from curvalg.distributed"
)


def load_problem(name: str, group: Any = None, arguments: Mapping[str, Any] | None = None) -> Problem:
    """The problem behind a name.

    Args:
        name: a built-in one, ``package.module:name``, or ``path/to/file.py:name``, of a function or of a Problem.
        group: the process group that shares the problem; None: one process.
        arguments: of the function, by name.

    Raises:
        ProblemError: an unknown name, a file or module that is not there or cannot be imported, arguments that the function
            does not take, what is no Problem, or a problem of one process where there are several.
    """
    source = source_of(name, _EXPECTED)
    problem = made(name, source, group, arguments or {}, expected=_EXPECTED)
    if not isinstance(problem, Problem):
        raise ProblemError(f"{name} returned a {type(problem).__name__}; {_EXPECTED}")
    if group is not None and problem.group.size != (size := process_group(group)[1]):
        takes = callable(source) and "group" in accepted(name, source, arguments or {}, group)
        why = "its Problem was made without it" if takes or source is problem else "it takes no group"
        raise ProblemError(
            f"{name} is run on {size} processes, but {why}, so that each would compute a matrix of its own. Give every process "
            f"its part of the data: {_SHARED}"
        )
    return problem


def made(name: str, source: Any, group: Any, arguments: Mapping[str, Any], *, expected: str) -> Any:
    """What a function returns; a Problem is there already.

    Args:
        name: on the command line, for messages.
        source: a function, or a Problem.
        group: the process group that shares the problem; None: one process.
        arguments: of the function, by name.
        expected: in words, for messages.

    Raises:
        ProblemError: it is neither, arguments that do not fit, or an error of the function.
    """
    if isinstance(source, Problem):
        if arguments:
            raise ProblemError(f"{name} is a Problem already, so that --arg has no function to go to; leave it out")
        return source
    if not callable(source):
        raise ProblemError(f"{name} is a {type(source).__name__}; {expected}")
    given = accepted(name, source, arguments, group)
    try:
        return source(**given)
    except CurvalgError as error:
        raise ProblemError(f"{name}: {error}") from error
    except Exception as error:
        raise ProblemError(f"calling {name} failed with {shown(error)}") from error


def source_of(name: str, expected: str) -> Any:
    """The function or object that a name stands for.

    Args:
        name: on the command line.
        expected: in words, for messages.

    Raises:
        ProblemError: a name that leads nowhere.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not is_named(name):
        known = list(BUILT_IN)
        raise ProblemError(
            f"no problem is called {name!r}{guess(name, known)}; expected {' or '.join(known)}, or your own as module:function "
            "or path/to/file.py:function"
        )
    return find_object(name, expected=expected)
