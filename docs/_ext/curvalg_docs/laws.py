"""The law book as a page."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from curvalg.rewrite import LAWS, Law, rewrite
from tests.support import witness

TITLES = {
    "transpose_rules": "Transposes",
    "inverse_rules": "Inverses",
    "term_rules": "Terms",
    "restriction_rules": "Sub-matrices",
    "root_rules": "Square roots",
    "approximation_rules": "Diagonal parts",
    "block_rules": "Block-diagonals",
    "partition_rules": "Block-diagonals over different partitions",
    "array_rules": "Matrices of arrays",
}
"""Rules live in one module for each kind of expression; its name -> the heading."""


def chapter(law: Law) -> str:
    """The name of the module that a law's rule is in."""
    module = inspect.getmodule(law.apply)
    assert module is not None
    return module.__name__.rpartition(".")[2]


def example(law: Law) -> str:
    """The first witness, before and after this law alone."""
    first = law.witnesses(witness)[0]
    before, after = (_LETTER.sub(r"\1", str(e)) for e in (first, rewrite(first, [law], law.loss).expr))
    return f"`{before}` → `{after}`"


_LETTER = re.compile(r"\b(\w)\(letter='\1'[^()]*\)")
"""A stand-in matrix prints its letter and its facts as options; the letter is enough here."""


def law_book(laws: Sequence[Law] = LAWS) -> str:
    """All laws, in the order in which they are tried, as Markdown."""
    lines: list[str] = []
    current = ""
    for number, law in enumerate(laws, 1):
        if (name := chapter(law)) != current:
            current = name
            lines += ["", f"## {TITLES.get(name, name.capitalize())}", ""]
        condition = f" Needs a loss for which this is known: {law.loss.name}." if law.loss else ""
        lines += [
            f"**{number}. {law.name[0].upper()}{law.name[1:]}.**{condition}",
            "",
            f"```text\n{law.statement}\n```",
            "",
            f"For example {example(law)}.",
            "",
        ]
    return "\n".join(lines)
