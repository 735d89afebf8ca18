"""The table that ``curvalg terms`` prints."""

from __future__ import annotations

import re

from rich import box
from rich.table import Table
from rich.text import Text

from curvalg import registry

_ROLE = re.compile(r":[\w:]+:`~?([^`]*)`")  # how docstrings refer to a class: :class:`Name`
_ROOMY = 100  # with fewer columns every cell has to fold, lest the last column is cut off


def terms_table(width: int) -> Table:
    """Every term that can be named, one row each; for a plugin that cannot be used, the row says why and what to do.

    Args:
        width: columns of the window.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("term", "what it is", "options", "from"):
        table.add_column(column, overflow="fold")
    broken = registry.failures()
    usable = [name for name in registry.names() if name not in broken]
    aliases = _aliases(usable)
    for name in usable:
        if name in aliases:
            continue
        spec = registry.spec(name)
        others = "".join(f"\nalso {alias}" for alias, target in aliases.items() if target == name)
        table.add_row(
            Text.assemble((name, "bold"), (others, "dim")),
            Text(_ROLE.sub(r"\1", spec.summary) or "(no description)"),
            Text("\n".join(map(str, spec.options))),
            Text("built-in" if spec.origin == "built-in" else _source(spec)),
        )
    for name, reason in sorted(broken.items()):
        table.add_row(Text(name, "bold red"), Text(reason, "red"), Text(), Text("broken", "red"))
    if width >= _ROOMY:
        _keep_whole(table, "term", "options", "from")
    else:
        _keep_whole(table, "from", widest=len("built-in"))
    return table


def _keep_whole(table: Table, *headers: str, widest: int = 24) -> None:
    """Let the descriptions give way first, so that names and options stay in one piece."""
    for column in table.columns:
        if column.header in headers:
            lines = [line for cell in column.cells for line in str(cell).split("\n")]
            column.min_width = min(widest, max(map(len, lines)))


def _aliases(names: list[str]) -> dict[str, str]:
    """The name that each alias stands for: short names whose term is called otherwise."""
    called = {name: registry.spec(name).name for name in names if "/" not in name}
    return {name: target for name, target in called.items() if target != name}


def _source(spec: registry.TermSpec) -> str:
    return f"{spec.distribution} {spec.version}" if spec.distribution else "this program"
