"""Docstrings say what they mean: asterisks and bars are multiplication, shapes and moduli, never markup."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_PARTS = re.compile(r"(``.*?``|:[a-z:]+:`[^`]*`|\*\*\w+\*\*|\\.)", re.DOTALL)
"""Literals, roles, bold words and what is escaped already."""


def escape(line: str) -> str:
    """A line of prose in which ``*`` and ``|`` stand for themselves."""
    line = re.sub(r"(?<=: )(\w)\.$", r"\1\\.", line)  # "size: n." is no list that is numbered from n
    parts = _PARTS.split(line)
    return "".join(part if n % 2 else re.sub(r"([*|])", r"\\\1", part) for n, part in enumerate(parts))


def lines(text: list[str]) -> list[str]:
    """A docstring with its prose escaped; examples (``>>>``, and what they print) and literal blocks stay."""
    result: list[str] = []
    literal: int | None = None  # the indentation of the line that announced a literal block
    example = False
    for line in text:
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        result.append(line if example or literal is not None else escape(line))
        if literal is None and line.rstrip().endswith("::"):
            literal = indent
    return result


def _process(app: Sphinx, what: str, name: str, found: Any, options: Any, text: list[str]) -> None:
    # Of an attribute's first line napoleon takes what stands before a colon for its type, unless that line is empty.
    text[:] = ["", *lines(text)] if what in ("attribute", "data", "property") else lines(text)


def setup(app: Sphinx) -> None:
    """Escape before napoleon (priority 500), which makes markup of its own."""
    app.connect("autodoc-process-docstring", _process, priority=400)
