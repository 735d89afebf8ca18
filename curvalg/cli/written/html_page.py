"""The page of ``curvalg report``: HTML that needs nothing beside itself; its tables are of :mod:`curvalg.markup`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #20242a; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #e3e5e8; }
section { overflow-x: auto; } table { border-collapse: collapse; } td { font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid #8a8f98; } th:first-child, td:first-child { text-align: left !important; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; } .note { color: #5c626b; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
"""
)


def page(title: str, sections: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A whole page with a title and sections.

    Args:
        title: plain text.
        sections: (heading as plain text, pieces of HTML) in their order.

    >>> "<h2>a &lt; b</h2>" in page("title", [("a < b", [note("fine")])])
    True
    """
    body = "\n".join(
        "\n".join(["<section>", f"<h2>{escape(heading)}</h2>", *pieces, "</section>"]) for heading, pieces in sections
    )
    return _PAGE.substitute(title=escape(title), body=body)


def note(text: str) -> str:
    """A line of plain text beside the results.

    >>> note("a & b")
    '<p class="note">a &amp; b</p>'
    """
    return f'<p class="note">{escape(text)}</p>'


def drawing(figure: Figure, name: str) -> str:
    """A figure as SVG; names inside it begin anew in each figure, so that they are kept apart by that of the figure.

    Args:
        figure: of matplotlib.
        name: what it shows, also for those who do not see it.
    """
    import matplotlib as mpl

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the same page for the same numbers
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    return f'<figure role="img" aria-label="{escape(name, quote=True)}">{text[text.index("<svg") :]}</figure>'
