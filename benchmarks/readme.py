"""Generated blocks of a page: what stands between ``<!-- name -->`` and ``<!-- /name -->``."""

from __future__ import annotations

import re


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {re.escape(name)} -->\n)(.*?)(\n<!-- /{re.escape(name)} -->)", re.DOTALL)


def block(text: str, name: str) -> str:
    """What stands there.

    Raises:
        ValueError: the markers are missing.
    """
    found = _pattern(name).search(text)
    if found is None:
        raise ValueError(f"expected the markers <!-- {name} --> and <!-- /{name} -->, each on a line of its own")
    return found[2]


def with_block(text: str, name: str, content: str) -> str:
    """The page with another content there.

    Raises:
        ValueError: the markers are missing.
    """
    block(text, name)
    return _pattern(name).sub(lambda found: found[1] + content + found[3], text)
