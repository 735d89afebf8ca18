"""Problems of ``--problem``: a built-in one by name, or the user's own as ``module:function``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from types import ModuleType
from typing import Any

from curvalg.cli.list_problems import BUILT_IN
from curvalg.distributed.making import process_group
from curvalg.errors import CurvalgError, ProblemError
from curvalg.problem import Problem

_EXPECTED = "expected a function without arguments, or with group alone, that returns a curvalg.Problem"
_SHARED = (
    "def make(group=None): ... return Problem(model, loss, shard(dataset, batch_size=64, group=group), group=group), with "
    "shard from curvalg.distributed"
)


def load_problem(name: str, group: Any = None) -> Problem:
    """The problem behind a name.

    Args:
        name: a built-in one, or ``package.module:function``.
        group: the process group that shares the problem; None: one process.

    Raises:
        ProblemError: an unknown name, a module that cannot be imported, a function that does not return a Problem, or one that
            returns a problem of one process where there are several.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](group)
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        known = list(BUILT_IN)
        raise ProblemError(
            f"no problem is called {name!r}{_guess(name, known)}; expected {' or '.join(known)}, or your own as "
            "module:function"
        )
    return _call(name, _find(_import(module_name), attribute), group)


def _import(name: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:  # an installed script starts without the current folder, unlike python -m
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            message = f"no module is called {error.name!r}, neither in {folder} nor installed"
        else:
            message = f"importing {name} failed with {_shown(error)}"
        raise ProblemError(message) from error


def _find(module: ModuleType, attribute: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            raise ProblemError(f"{module.__name__} has no {attribute}{_guess(attribute, public)}; {_EXPECTED}")
        found = getattr(found, part)
    return found


def _call(name: str, function: Any, group: Any) -> Problem:
    if not callable(function):
        raise ProblemError(f"{name} is a {type(function).__name__}; {_EXPECTED}")
    parameters = _parameters(function)
    if needed := [p.name for p in parameters if p.default is p.empty and p.name != "group"]:
        raise ProblemError(f"{name} needs {', '.join(needed)}; {_EXPECTED}")
    wanted = [p for p in parameters if p.name == "group" and (group is not None or p.default is p.empty)]
    try:
        problem = function(**{p.name: group for p in wanted})
    except CurvalgError as error:
        raise ProblemError(f"{name}: {error}") from error
    except Exception as error:
        raise ProblemError(f"calling {name} failed with {_shown(error)}") from error
    if not isinstance(problem, Problem):
        raise ProblemError(f"{name} returned a {type(problem).__name__}; {_EXPECTED}")
    if group is not None and problem.group.size != (size := process_group(group)[1]):
        why = "its Problem was made without it" if wanted else "it takes no group"
        raise ProblemError(
            f"{name} is run on {size} processes, but {why}, so that each would compute a matrix of its own. Give every process "
            f"its part of the data: {_SHARED}"
        )
    return problem


def _parameters(function: Any) -> list[inspect.Parameter]:
    """Those that have a name of their own and may be given by it, and those that must be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return []
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in parameters if p.kind not in starred]


def _shown(error: BaseException) -> str:
    """The exception and the place where the user's code raised it."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"  # says its place itself
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _guess(name: str, known: list[str]) -> str:
    """
    >>> _guess("digit", ["digits", "digits-cnn"])
    " (did you mean 'digits'?)"
    """
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
