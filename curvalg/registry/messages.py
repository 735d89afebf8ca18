"""Messages about a text that point to a place in it."""

from __future__ import annotations

ALLOWED = (
    "an expression is made of names of terms, numbers, + - * / @ **, .T, and calls: name(option=value), "
    "term('distribution/name', option=value), inverse(e), sqrt(e), inv_sqrt(e), restrict(e, 'name'), "
    "block_diagonal(e), diagonal_part(e), nystrom(e, rank), identity, zero"
)


def located(source: str, line: int, column: int, message: str) -> str:
    """A message, the line it is about and a caret under the place; long lines are cut around it."""
    lines = source.split("\n")
    shown = lines[min(line, len(lines)) - 1]
    start = max(0, column - 80)
    return f"{message}\n  {shown[start : column + 40]}\n  {' ' * (column - start)}^"
