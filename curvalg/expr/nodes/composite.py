"""Nodes that are made of other expressions: what is found of them once and kept, and how deep they may nest.

A question about a node is answered from the answers of its parts, innermost first and each once, so that neither time nor
Python's stack grows with how deep an expression nests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from curvalg.errors import ExpressionError, OptionError
from curvalg.expr.entries import Entries
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.node import Expr, Space, require_hashable

T = TypeVar("T")

Side = tuple[Space | None, tuple[str, ...] | None]
"""A space, and the patterns of the parameters it is restricted to (None: all)."""

MAX_DEPTH = 500
"""How deep expressions may nest; comparing two equal ones takes a level of Python's stack for each."""


def bottom_up(expr: Expr, known: Callable[[Expr], bool]) -> Iterator[Expr]:
    """An expression and the composite nodes in it whose answer is not known yet, parts first."""
    todo = [(expr, False)]
    while todo:
        node, ready = todo.pop()
        if known(node):
            continue
        if ready:
            yield node
        else:
            todo += [(node, True), *((part, False) for part in node.children if part.children)]


def settled(expr: Expr, key: Hashable, find: Callable[[Any], T]) -> T:
    """The result of ``find`` for a node, kept with the node under a key; its parts are settled first."""
    for node in bottom_up(expr, lambda node: key in node.known):
        node.known[key] = find(node)
    value: T = expr.known[key]
    return value


class Composite(Expr):
    """A node with parts. What is found out about it and kept counts neither for equality nor in a pickle."""

    def __post_init__(self) -> None:
        for part in self.children:
            if not part.children:
                require_hashable(part)
        depth = 1 + max((child.depth for child in self.children), default=0)
        if depth > MAX_DEPTH:
            raise ExpressionError(
                f"the expression nests more than {MAX_DEPTH} levels deep; sums and products of many operands do not nest, "
                "inverse(inverse(...) + ...) does"
            )
        self.known["depth"] = depth
        self.known["sides"] = self.find_sides()  # now, while those of the parts are at hand

    # -- what a kind of node says ---------------------------------------------------------------------------------------

    def find_sides(self) -> tuple[Side, Side]:
        """Find codomain and domain from those of the parts."""
        raise NotImplementedError

    def find_facts(self, loss: LossFacts | None) -> Facts:
        """What is known of the matrix, from what is known of its parts."""
        raise NotImplementedError

    def content(self, of: Callable[[Expr], Hashable]) -> Hashable:
        """The content that two equal nodes share, with ``of`` of the parts in the place of the parts."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return tuple(of(value) if isinstance(value, Expr) else value for value in values)

    # -- what is kept ---------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:  # type: ignore[override]
        return settled(self, "depth", lambda node: 1 + max((child.depth for child in node.children), default=0))

    @property
    def sides(self) -> tuple[Side, Side]:
        """Codomain and domain of the node."""
        sides: tuple[Side, Side] = settled(self, "sides", lambda node: node.find_sides())
        return sides

    @property
    def domain(self) -> Space | None:  # type: ignore[override]
        return self.sides[1][0]

    @property
    def codomain(self) -> Space | None:  # type: ignore[override]
        return self.sides[0][0]

    @property
    def domain_params(self) -> tuple[str, ...] | None:
        return self.sides[1][1]

    @property
    def codomain_params(self) -> tuple[str, ...] | None:
        return self.sides[0][1]

    def facts(self, loss: LossFacts | None = None) -> Facts:
        facts: Facts = settled(self, ("facts", loss), lambda node: node.find_facts(loss))
        return facts

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(other) is not type(self):
            return NotImplemented
        if hash(self) != hash(other):
            return False
        if self.content(_same) == other.content(_same):
            return True
        numbers: dict[Hashable, int] = {}
        return _numbered(self, numbers) == _numbered(other, numbers)

    def __hash__(self) -> int:
        return settled(self, "hash", lambda node: hash((type(node), node.content(hash))))


def _same(part: Expr) -> Hashable:
    """A key that is equal for one and the same node, and for equal nodes without parts."""
    return id(part) if part.children else part


def _numbered(expr: Expr, numbers: dict[Hashable, int]) -> int:
    """A number that equal expressions share: given to nodes by their content and the numbers of their parts."""
    found: dict[int, int] = {}

    def number(part: Expr) -> Hashable:
        return found[id(part)] if part.children else part

    for node in bottom_up(expr, lambda node: id(node) in found):
        content = node.content(number) if isinstance(node, Composite) else node
        found[id(node)] = numbers.setdefault((type(node), content), len(numbers))
    return found[id(expr)]


# -- between which spaces ----------------------------------------------------------------------------------------------


def side(expr: Expr, which: Literal["domain", "codomain"]) -> Side:
    """A description of the codomain or domain. Two expressions fit together where these are equal."""
    if which == "domain":
        return expr.domain, expr.domain_params
    return expr.codomain, expr.codomain_params


def square(expr: Expr) -> bool:
    """Whether both sides are the same space, as written; two different patterns may choose the same parameters."""
    return side(expr, "domain") == side(expr, "codomain")


def shape(expr: Expr) -> str:
    """The text ``domain -> codomain``, for messages."""

    def name(which: Literal["domain", "codomain"]) -> str:
        space, params = side(expr, which)
        return f"{space or 'any'}{list(params) if params else ''}"

    return f"{name('domain')} -> {name('codomain')}"


def require_endomorphism(expr: Expr, what: str) -> None:
    """Raise unless an expression maps parameters to the same parameters.

    Raises:
        ExpressionError: not an expression, or one with another side.
    """
    if not isinstance(expr, Expr):
        raise ExpressionError(f"{what}() takes an expression such as registry.build('ggn'), got {type(expr).__name__}")
    if {expr.domain, expr.codomain} - {"parameters", None} or expr.domain_params != expr.codomain_params:
        raise ExpressionError(f"{what}() needs an operator on parameters; {expr} is {shape(expr)}")


def require_semidefinite(expr: Expr, what: str) -> None:
    """Raise if a matrix is known, for any loss, not to be symmetric or not to be positive semi-definite.

    Raises:
        ExpressionError: one of the two is refuted.
    """
    facts = expr.facts()
    if facts.psd is False:
        missing = "symmetric" if facts.symmetric is False else "positive semi-definite"
        raise ExpressionError(f"{what}() needs a symmetric positive semi-definite operator; {expr} is not {missing}")


def as_patterns(params: str | Sequence[str]) -> tuple[str, ...]:
    """Names or glob patterns as a tuple without repeats.

    Raises:
        ExpressionError: empty, or not strings.
    """
    if isinstance(params, tuple) and params and isinstance(params[0], Entries):
        return params  # of a zero between entries
    given = (params,) if isinstance(params, str) or not isinstance(params, Iterable) else tuple(params)
    patterns = tuple(p for i, p in enumerate(given) if p not in given[:i])
    if not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise OptionError(f"expected parameter names or glob patterns such as 'head.*', got {params!r}")
    return patterns
