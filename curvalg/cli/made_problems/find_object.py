"""The object behind ``module:name`` or ``path/to/file.py:name``, imported as Python would."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from curvalg.errors import ProblemError


def find_object(name: str, *, expected: str) -> Any:
    """The object that a name of the command line stands for.

    Args:
        name: ``package.module:name``, looked for in the current folder first, or ``path/to/file.py:name``; the name after the
            colon may have dots.
        expected: what is looked for, for messages.

    Raises:
        ProblemError: a file, module or attribute that is not there, or a module that cannot be imported; the message says what
            was found instead.
    """
    place, _, attribute = name.rpartition(":")  # the last colon: paths of Windows have one of their own
    module = _import_file(Path(place)) if is_file(place) else _import(place)
    if not attribute:
        raise ProblemError(f"{name!r} does not say what to take of {place}; {_offers(module)}. {_sentence(expected)}")
    return _attribute(module, place, attribute, expected)


def is_named(name: str) -> bool:
    """Whether a text has the form of a name that :func:`find_object` takes."""
    place, colon, attribute = name.rpartition(":")
    return bool(colon and place and (attribute or is_file(place)))


def is_file(place: str) -> bool:
    """Whether a place is a file of Python rather than a module.

    >>> is_file("models/make.py"), is_file("models.make"), is_file("./make")
    (True, False, True)
    """
    return place.endswith(".py") or "/" in place or os.sep in place


def shown(error: BaseException) -> str:
    """The exception and the place where the user's code raised it."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"  # says its place itself
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def guess(name: str, known: Sequence[str]) -> str:
    """
    >>> guess("digit", ["digits", "digits-cnn"])
    " (did you mean 'digits'?)"
    """
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _import(name: str) -> ModuleType:
    folder = os.getcwd()
    _search_first(folder)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            message = f"no module is called {error.name!r}, neither in {folder} nor installed; a file is named path/to/file.py"
        else:
            message = f"importing {name} failed with {shown(error)}"
        raise ProblemError(message) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent
        there = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
        found = f"the files of Python there are {', '.join(there)}" if there else f"{folder} has no file of Python"
        raise ProblemError(f"there is no file {path} (in {os.getcwd()}){guess(path.name, there)}; {found}")
    path = path.resolve()
    name = _module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    _search_first(str(path.parent))  # what it imports from beside itself
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ProblemError(f"{path} is no file of Python; its name must end in .py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ProblemError(f"running {path} failed with {shown(error)}") from error
    return module


def _module_name(path: Path) -> str:
    """A name of its own for each file: two checkpoints may be made by two files that are called alike."""
    return f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _search_first(folder: str) -> None:
    if folder not in sys.path:  # an installed script starts without the current folder, unlike python -m
        sys.path.insert(0, folder)
    importlib.invalidate_caches()


def _attribute(module: ModuleType, place: str, attribute: str, expected: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            hint = guess(attribute, _own(module))
            raise ProblemError(f"{place} has no {attribute}{hint}; {_offers(module)}. {_sentence(expected)}")
        found = getattr(found, part)
    return found


def _own(module: ModuleType) -> list[str]:
    """Names of functions and objects of curvalg's that a module defines itself, rather than imports."""

    def is_own(value: Any) -> bool:
        if isinstance(value, type) or hasattr(value, "__qualname__"):
            return callable(value) and value.__module__ == module.__name__
        return type(value).__module__.startswith("curvalg.")

    return [name for name, value in vars(module).items() if not name.startswith("_") and is_own(value)]


def _offers(module: ModuleType) -> str:
    names = _own(module)
    return f"it defines {', '.join(names)}" if names else "it defines nothing"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
