"""What a shell offers for the word under its cursor: names of terms in an expression, and names of problems.

Files are read, never imported: pressing a key runs no code of the user's, and imports no torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

BUILT_IN_NAMES = ("digits", "digits-cnn")
"""Problems that need no file, as in ``list_problems``, which imports torch."""

_LAST_WORD = re.compile(r"[A-Za-z_][\w/-]*$")
_MOST_FILES = 100


def complete_expression(incomplete: str) -> list[str]:
    """The text with its last word completed to each term or word of the syntax that it may become.

    Args:
        incomplete: the expression so far.

    >>> complete_expression("2*ggn + hess")
    ['2*ggn + hessian', '2*ggn + hessian_diagonal', '2*ggn + hessian_fd']
    """
    from curvalg import registry
    from curvalg.registry.spec import RESERVED

    found = _LAST_WORD.search(incomplete)
    word = found.group() if found else ""
    head = incomplete[: len(incomplete) - len(word)]
    return [head + name for name in sorted({*registry.names(), *RESERVED}) if name.startswith(word)]


def complete_problem(incomplete: str) -> list[str]:
    """Built-in problems, folders, and ``path/to/file.py:name`` of functions and Problems that files define.

    Args:
        incomplete: the name so far, looked for from the current folder.
    """
    place, colon, start = incomplete.rpartition(":")
    if colon:
        path = Path(place) if place.endswith(".py") else Path(*place.split(".")).with_suffix(".py")
        return [f"{place}:{name}" for name in _defined(path) if name.startswith(start)]
    return [*(name for name in BUILT_IN_NAMES if name.startswith(incomplete)), *_beside(incomplete)]


def _beside(incomplete: str) -> Iterator[str]:
    head, slash, start = incomplete.rpartition("/")
    folder = Path((head or "/") if slash else ".")
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    fitting = [path for path in entries if path.name.startswith(start) and not path.name.startswith((".", "_"))]
    for path in fitting[:_MOST_FILES]:
        shown = f"{head}{slash}{path.name}"
        if path.is_dir():
            yield f"{shown}/"
        elif path.suffix == ".py":
            yield from (f"{shown}:{name}" for name in _defined(path))


def _defined(path: Path) -> list[str]:
    """Public functions of a file, and names that are assigned a call of ``Problem``; none where it cannot be read."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):  # what is half written is no error of the one who presses a key
        return []
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    assigned = [
        target.id
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Name) and ast.unparse(node.value.func).split(".")[-1] == "Problem"
    ]
    return [name for name in [*functions, *assigned] if not name.startswith("_")]
