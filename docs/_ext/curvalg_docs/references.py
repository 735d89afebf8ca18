"""Cross-references to public names from wherever they are spelled by their private home."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from curvalg_docs.api import homes

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment


def _resolve(app: Sphinx, env: BuildEnvironment, node: Element, content: Element) -> Any:
    """Annotations say ``curvalg.expr.node.Expr`` or, unevaluated, ``Expr``; pages document ``curvalg.Expr``."""
    if node.get("refdomain") != "py":
        return None
    target = str(node.get("reftarget", ""))
    last = target.rpartition(".")[2]
    home = homes().get(last)
    domain: Any = env.get_domain("py")
    if home is not None and home != target:
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", home, node, content)
    # A private alias of an annotation, or a module without a page: the text stays, without a link.
    return content if target.startswith(("curvalg.", "curvalg_plugins.")) or "." not in target else None


def setup(app: Sphinx) -> None:
    """Connect the resolver."""
    app.connect("missing-reference", _resolve)
