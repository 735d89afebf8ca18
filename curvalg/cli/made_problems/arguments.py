"""Arguments of ``--arg NAME=VALUE``, for the function that makes a problem."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from curvalg.errors import ProblemError


def parsed(given: Sequence[str]) -> dict[str, Any]:
    """The arguments by name; a value is a Python literal where it can be read as one, else text.

    Args:
        given: of the command line, each ``NAME=VALUE``.

    Raises:
        ProblemError: one that is not of this form, or a name that comes twice.

    >>> parsed(["width=64", "rates=[0.1, 0.2]", "kind=deep", "tag='7'"])
    {'width': 64, 'rates': [0.1, 0.2], 'kind': 'deep', 'tag': '7'}
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ProblemError(f"--arg is NAME=VALUE with a Python name, such as --arg width=64; got {text!r}")
        if name in found:
            raise ProblemError(f"--arg {name} is given twice, as {found[name]!r} and as {value}; leave one of them out")
        found[name] = _value(value)
    return found


def accepted(name: str, function: Callable[..., Any], arguments: Mapping[str, Any], group: Any) -> dict[str, Any]:
    """The arguments that a function is called with: those of the user, and ``group`` where it takes one.

    Args:
        name: of the function, for messages.
        function: makes a problem.
        arguments: of the user.
        group: the process group that shares the problem; None: one process.

    Raises:
        ProblemError: an argument that the function has not, or one that it needs and does not get; the message has
            the signature.
    """
    signature = _signature(function)
    if signature is None:
        return dict(arguments)
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {p.name: p for p in signature.parameters.values() if p.kind not in starred}
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    if unknown := [given for given in arguments if given not in named and not anything]:
        close = difflib.get_close_matches(unknown[0], named, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ProblemError(f"{name} has no argument {unknown[0]!r}{hint}; its signature is {signature}")
    required = [p.name for p in named.values() if p.default is p.empty and p.name not in (*arguments, "group")]
    if required:
        cure = " ".join(f"--arg {missing}=..." for missing in required)
        raise ProblemError(f"{name} needs {', '.join(required)}; its signature is {signature}. Pass {cure}")
    takes = "group" in named and "group" not in arguments
    wanted = takes and (group is not None or named["group"].default is inspect.Parameter.empty)
    return {**arguments, "group": group} if wanted else dict(arguments)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # all that reading what is no literal may raise
        return text


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have none
        return None
