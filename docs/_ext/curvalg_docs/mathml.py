"""Formulas as MathML, which browsers draw by themselves: pages work without a network and without scripts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.utils.math import pick_math_environment
from docutils.utils.math.latex2mathml import tex2mathml

if TYPE_CHECKING:
    from sphinx.application import Sphinx

MACROS = {r"\operatorname*": r"\operatorname", r"\lVert": r"\|", r"\rVert": r"\|", r"\tfrac": r"\frac"}
"""What the converter does not know, in words that it knows."""


_ACCENT = re.compile(r"\\(bar|hat|tilde|dot|ddot)\s*(?:\{([^{}]*)\}|(\\?[A-Za-z]+?)(?![A-Za-z])|([A-Za-z]))")
"""An accent and its letter: in a group with something empty, or the converter puts a subscript under instead of beside it."""

_FUNCTION = re.compile(
    r"(?P<before>[A-Za-z0-9})\]]\s*)?(?P<name>\\operatorname\{[^{}]*\}|\\(?:log|det|exp|max|min|sin|cos)(?![A-Za-z]))"
    r"(?P<after>\s*(?=[A-Za-z0-9\\{])(?!\\(?:left|,|;|quad|in\b|to\b|cdot|big|[lr]Vert|\|)))?"
)
"""The name of a function, which browsers set without the thin spaces that TeX puts between it and letters."""

_BAR = re.compile(r"<mo( stretchy=\"false\")?>([|‖])</mo>")
"""A bar, to which browsers give the space of a relation."""


def _spaced(found: re.Match[str]) -> str:
    before = found["before"] + r"\, " if found["before"] else ""
    after = r"\, " if found["after"] is not None else ""
    return before + found["name"] + after


def convert(tex: str, *, block: bool = False) -> str:
    """A formula as MathML; a formula that the converter does not know raises."""
    for macro, known in MACROS.items():
        tex = tex.replace(macro, known)
    tex = _ACCENT.sub(lambda m: rf"{{\{m[1]}{{{m[2] or m[3] or m[4]}}}{{}}}}", tex)
    if block and r"\\" in tex and r"\begin" not in tex:
        tex = rf"\begin{{{pick_math_environment(tex)}}}{tex}\end{{{pick_math_environment(tex)}}}"
    found = str(tex2mathml(_FUNCTION.sub(_spaced, tex), as_block=block))
    return _BAR.sub(r'<mo\1 lspace="0" rspace="0">\2</mo>', found)


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{convert(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the renderer ``mathml``."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
