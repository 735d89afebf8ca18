"""What the documentation generates from the code, and the Sphinx extension that puts it into the pages.

Every generator is a function from the code to text or to a picture, and knows nothing of Sphinx, so that tests can ask it
too. :func:`setup` writes what they give under ``docs/_generated`` before the pages are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def generate(docs: Path) -> None:
    """Write everything that is generated, under ``docs/_generated``."""
    from curvalg_docs import api, benchmarks, catalogue, diagram, laws, pages, strategies
    from curvalg_docs.files import write

    include = docs / "_generated" / "include"
    write(include / "laws.md", laws.law_book())
    write(include / "strategies.md", strategies.strategy_table())
    write(include / "benchmarks.md", benchmarks.tables(docs.parent / "benchmarks", docs / "_generated" / "benchmarks"))
    diagram.draw(docs / "_generated" / "concepts.svg")
    catalogue.write_pages(docs / "_generated" / "catalogue")
    api.write_pages(docs / "_generated" / "api")
    pages.run_figures(docs)


def setup(app: Sphinx) -> dict[str, Any]:
    """The extension: generates, and knows formulas as MathML and docstrings by name."""
    from curvalg_docs import directives, made, mathml, plain, references

    mathml.setup(app)
    directives.setup(app)
    plain.setup(app)
    made.setup(app)
    references.setup(app)
    # Before sphinx-gallery (priority 500) and before autodoc reads anything.
    app.connect("builder-inited", lambda app: generate(Path(app.srcdir)), priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
