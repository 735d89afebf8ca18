"""The directive ``docstring``: the docstring of any object, without its signature."""

from __future__ import annotations

import inspect
import pydoc
from typing import TYPE_CHECKING

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective

from curvalg_docs import plain

if TYPE_CHECKING:
    from sphinx.application import Sphinx


class DocstringDirective(SphinxDirective):
    """``.. docstring:: package.module.Name`` is replaced by the docstring, read as Google's style."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The docstring's nodes."""
        name = self.arguments[0]
        found = pydoc.locate(name)
        if found is None:
            raise self.error(f"there is no {name}")
        text = plain.lines((inspect.getdoc(found) or "").splitlines())
        lines = GoogleDocstring(text, self.config, what="function", name=name).lines()
        parent = nodes.section()
        parent.document = self.state.document
        self.state.nested_parse(StringList(lines, source=name), self.content_offset, parent)
        return parent.children


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("docstring", DocstringDirective)
