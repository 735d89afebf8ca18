"""HTML that notebooks show: cards of facts, tables with bars, and pictures inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

_FACT = "padding:1px 12px 1px 0;text-align:left;vertical-align:top;white-space:pre-line"
_CELL = "padding:1px 12px 1px 0;text-align:right"
WIDEST = 80
"""Pixels of the longest bar."""


def card(title: str, facts: Mapping[str, str], *more: str) -> str:
    """A title, a line for each fact, and what comes below, which is HTML already.

    >>> card("GGN", {"size": "3 x 3"}).count("<tr>")
    1
    """
    lines = "".join(
        f'<tr><th style="{_FACT};font-weight:normal;opacity:.7">{escape(name)}</th><td style="{_FACT}">{escape(fact)}</td></tr>'
        for name, fact in facts.items()
    )
    return f"<div><strong>{escape(title)}</strong><table>{lines}</table>{''.join(more)}</div>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], bars: Sequence[float] | None = None) -> str:
    """A table of text; the signed bars, one for each row, are drawn beside it to one scale, negative ones hollow."""
    head = "".join(f'<th style="{_CELL}">{escape(column)}</th>' for column in columns)
    largest = max((abs(bar) for bar in bars or ()), default=0.0)
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in row)
        if bars is not None:
            cells += f'<td style="text-align:left">{_bar(bars[i], largest)}</td>'
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _bar(value: float, largest: float) -> str:
    width = round(WIDEST * abs(value) / largest) if largest else 0
    fill = "background:none;" if value < 0 else "background:currentColor;"
    return f'<div style="{fill}border:1px solid currentColor;opacity:.6;height:.6em;width:{width}px"></div>'


def formula(latex: str) -> str:
    """A formula, which the page typesets."""
    return f"<div>{escape(latex)}</div>"


def picture(draw: Callable[[Any], Any]) -> str:
    """What is drawn on matplotlib axes, as an image inside the page; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    figure, file = Figure(figsize=(5, 3), layout="constrained"), io.BytesIO()
    draw(figure.subplots())
    figure.savefig(file, format="png", dpi=100)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
