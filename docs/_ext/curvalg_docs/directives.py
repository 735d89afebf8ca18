"""The directive ``docstring``: the docstring of any object, without its signature."""

from __future__ import annotations

import inspect
import pydoc
import re
from typing import TYPE_CHECKING

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.ext.napoleon import Config, GoogleDocstring
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
        # Outside of a signature, a list of options reads better than fields.
        config = Config(napoleon_use_param=False, napoleon_use_rtype=False)
        lines = [
            part
            for line in GoogleDocstring(text, config, what="function", name=name).lines()
            # Each exception in a paragraph of its own.
            for part in re.sub(r"^:raises (\w+):", r"\n**Raises** :py:exc:`~curvalg.errors.\1`:", line).split("\n")
        ]
        parent = nodes.section()
        parent.document = self.state.document
        self.state.nested_parse(StringList(lines, source=name), self.content_offset, parent)
        found_nodes: list[nodes.Node] = parent.children
        return found_nodes


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("docstring", DocstringDirective)
