"""The command ``curvalg explain`` without a problem: what is known of an expression by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from curvalg import registry
from curvalg.errors import LossError, RegistryError
from curvalg.expr import DatasetTerm, Expr, Facts, GradientTerm, LossFacts, MatrixTerm, Term
from curvalg.expr.nodes.inverse import Inverse
from curvalg.expr.term import NamedExpr
from curvalg.rewrite import simplify

ANY = LossFacts("every loss", convex=True, likelihood=True, fisher_is_ggn=True, classes=True)
"""Facts of a loss that every term is defined for."""

LESS: tuple[tuple[str, LossFacts | None], ...] = (
    ("a loss", None),
    ("a loss that is a negative log-likelihood", replace(ANY, likelihood=False)),
    ("a loss of class labels", replace(ANY, classes=False)),
    ("a loss that compares an output with a target", replace(ANY, of_output=False)),
    ("a loss of every sample", replace(ANY, per_sample=False)),
)
"""What a term may need, and a loss (or none) that lacks just this."""

WORK: tuple[tuple[type[Expr], str], ...] = (
    (DatasetTerm, "statistics of the whole data set, kept; then a pass over the data for each product"),
    (Term, "a pass over the data for each product, of which sums of such terms share one"),
    (MatrixTerm, "a pass over the data to make its matrix, whose products need no data"),
    (GradientTerm, "gradients of the loss alone, some for each product"),
    (Inverse, "a factorisation where the structure allows one, else an iterative solve for each product"),
)
"""Kinds of nodes, and what a node costs; the first that fits counts."""


def text(expr: Expr) -> str:
    """The report: the tree, what it simplifies to, size, facts, terms with their options, and what a problem has to have.

    Args:
        expr: of any kind; nothing is computed.

    >>> from curvalg import Identity
    >>> print(text(2 * registry.build("ggn") - registry.build("ggn") + Identity).splitlines()[0])
    sum
    """
    rewritten = simplify(expr)
    fired = Counter(step.law for step in rewritten.steps)
    sections = {
        "expression": [str(expr)],
        "simplified": [str(rewritten.expr), *(f"by {law}" + f" ({n} times)" * (n > 1) for law, n in fired.items())],
        "operator": [f"{_space(expr.codomain)} x {_space(expr.domain)}", *_facts(expr)],
        "terms": [line for node in _named(rewritten.expr) for line in _term(node)],
        "needs": list(dict.fromkeys(_needs(rewritten.expr))),
    }
    if not fired:
        del sections["simplified"]
    lines = [line for title, found in sections.items() if found for line in (title, *(f"  {line}" for line in found))]
    return "\n".join([expr.tree(), "", *lines])


def _space(space: str | None) -> str:
    return space or "any size"


def _facts(expr: Expr) -> Iterator[str]:
    """Symmetry and definiteness; where they depend on the loss, what they are for a convex one."""
    here, convex = expr.facts(), expr.facts(ANY)
    for entry in vars(Facts()):
        now, then = getattr(here, entry), getattr(convex, entry)
        words = entry.replace("_", " ") if entry != "psd" else "positive semi-definite"
        yield f"{words}: {_word(now)}" + (f", {_word(then)} for a convex loss" if then != now else "")


def _word(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[value]


def _named(expr: Expr) -> list[NamedExpr]:
    return list(dict.fromkeys(node for node in expr.walk() if isinstance(node, NamedExpr)))


def _term(node: NamedExpr) -> Iterator[str]:
    """How it is written here, and its signature and summary where the registry knows it."""
    yield str(node)
    try:
        spec = registry.spec(node.label)
    except RegistryError:  # a term of the running program
        return
    yield f"  {spec.signature}"
    if spec.summary:
        yield f"  {spec.summary}"


def _needs(expr: Expr) -> Iterator[str]:
    named = _named(expr)
    if not expr.domain and not named:
        return
    yield "a problem: a model and data (--problem)"
    for what, loss in LESS:
        if lacking := [node.label for node in named if _refuses(node, loss)]:
            yield f"{what}, for {', '.join(dict.fromkeys(lacking))}"
    if numbered := [node.label for node in named if node.numbered]:
        yield f"data in an order that stays, for the draws of {', '.join(dict.fromkeys(numbered))}"
    for node in expr.walk():
        work = next((work for kind, work in WORK if isinstance(node, kind)), None)
        if work is not None:
            yield f"{node.label if isinstance(node, NamedExpr) else 'inverse'}: {work}"


def _refuses(node: NamedExpr, loss: LossFacts | None) -> bool:
    try:
        node.validate(loss)
    except LossError:
        return True
    return False
