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
from curvalg.errors import CurvalgError, ProblemError
from curvalg.problem import Problem

_EXPECTED = "expected a function without arguments that returns a curvalg.Problem"


def load_problem(name: str) -> Problem:
    """The problem behind a name.

    Args:
        name: a built-in one, or ``package.module:function``.

    Raises:
        ProblemError: an unknown name, a module that cannot be imported, or a function that does not return a Problem.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        known = list(BUILT_IN)
        raise ProblemError(
            f"no problem is called {name!r}{_guess(name, known)}; expected {' or '.join(known)}, or your own as "
            "module:function"
        )
    return _call(name, _find(_import(module_name), attribute))


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


def _call(name: str, function: Any) -> Problem:
    if not callable(function):
        raise ProblemError(f"{name} is a {type(function).__name__}; {_EXPECTED}")
    if needed := _required(function):
        raise ProblemError(f"{name} needs {', '.join(needed)}; {_EXPECTED}")
    try:
        problem = function()
    except CurvalgError as error:
        raise ProblemError(f"{name}: {error}") from error
    except Exception as error:
        raise ProblemError(f"calling {name} failed with {_shown(error)}") from error
    if not isinstance(problem, Problem):
        raise ProblemError(f"{name} returned a {type(problem).__name__}; {_EXPECTED}")
    return problem


def _required(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return []
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in starred]


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
