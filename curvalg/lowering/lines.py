"""Lines of ``explain()``: nesting, and many parts that look alike reported once."""

from __future__ import annotations

import re
from collections.abc import Sequence

NAMED = 4
"""How many parts are named when many look alike; only the number of the others is given."""


def indent(lines: Sequence[str]) -> list[str]:
    """Lines indented by two spaces."""
    return [f"  {line}" for line in lines]


def alike(parts: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Parts (names, lines), those that differ in numbers only reported once, with the lines of the first."""
    groups: dict[str, list[tuple[str, Sequence[str]]]] = {}
    for label, lines in parts:
        groups.setdefault(re.sub(r"[0-9.]+(e[+-]?[0-9]+)?", "#", "\n".join(lines)), []).append((label, lines))
    result: list[str] = []
    for group in groups.values():
        names = [label for label, _ in group]
        result += [f"over {names[0]}:", *indent(group[0][1])]
        if len(names) > 1:
            more = "" if len(names) <= NAMED + 1 else f" and {len(names) - NAMED - 1} more"
            result.append(f"  and alike over {'; '.join(names[1 : NAMED + 1])}{more}")
    return result
