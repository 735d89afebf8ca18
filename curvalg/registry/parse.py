"""Reading expressions from text, the inverse of printing: by Python's syntax tree, without evaluating anything."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from curvalg.errors import ExpressionError
from curvalg.expr.entries import Entries
from curvalg.expr.node import Expr
from curvalg.registry import default
from curvalg.registry.messages import ALLOWED, located
from curvalg.registry.reader import MAX_DEPTH, Reader
from curvalg.registry.registry import Registry
from curvalg.registry.spec import RESERVED

_STRING_OR_LEAF = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?P<leaf>[A-Za-z_]\w*<[^<>]*>)""")


def parse(
    text: str, *, leaves: Mapping[str, Expr | Entries] = MappingProxyType({}), registry: Registry | None = None
) -> Expr:
    """The expression that a text denotes: ``parse(str(e)) == e`` for every expression without arrays.

    Numbers are exact: ``1/3`` is a third, ``0.1`` a tenth.

    Args:
        text: an expression as it prints.
        leaves: name -> expression, or entries, for what no text can hold; the name is an identifier (``D``) or exactly what a
            leaf prints as (``Diagonal<3, float64>``). Comes before the registry.
        registry: where names are looked up; None: the default one.

    Returns:
        the expression.

    Raises:
        ExpressionError: no expression; the message points at the place and says what is allowed.
        RegistryError: a name that is not registered, or options that do not fit.

    >>> print(parse("2 * hessian / 6 + 1e-3 * identity"))
    hessian / 3 + 0.001*identity
    """
    if not isinstance(text, str):
        raise ExpressionError(f"expected an expression as a string, got {type(text).__name__}")
    for name, leaf in leaves.items():
        _check_leaf(name, leaf)
    source = text.strip()
    plain, named = _with_placeholders(source, leaves)
    reader = Reader(source, named, default if registry is None else registry)
    try:
        root = _syntax_tree(plain)
    except SyntaxError as error:
        line = error.lineno or 1
        end = len(source.split("\n")[min(line, source.count("\n") + 1) - 1])
        column = min((error.offset or end + 1) - 1, end)  # no offset: the text ends too early
        raise ExpressionError(located(source, line, column, f"this cannot be read ({error.msg}); {ALLOWED}")) from error
    except (RecursionError, MemoryError) as error:
        raise ExpressionError(_TOO_DEEP.format(source[:60])) from error
    except ValueError as error:  # null bytes
        raise ExpressionError(f"the text cannot be read ({error}); {ALLOWED}") from error
    try:
        return reader.read(root)
    except RecursionError as error:
        raise ExpressionError(_TOO_DEEP.format(source[:60])) from error


_TOO_DEEP = f"the expression nests too deeply, at most {MAX_DEPTH} levels: {{}}..."

_MAY_WARN = re.compile(r"\\|(?<![\w.])[0-9.][\w.]*(?:and|else|for|if|in|is|not|or)")
"""An escape that is none, or a word right after a number: what Python's own parser warns of."""


def _syntax_tree(text: str) -> ast.expr:
    if not _MAY_WARN.search(text):
        return ast.parse(text, mode="eval").body
    with warnings.catch_warnings():  # Python's own, about text that no source file holds
        warnings.simplefilter("ignore")
        return ast.parse(text, mode="eval").body


def _check_leaf(name: Any, leaf: Any) -> None:
    if not isinstance(leaf, (Expr, Entries)):
        raise ExpressionError(f"leaves: expected an expression, or entries, for {name!r}, got {type(leaf).__name__}")
    match = _STRING_OR_LEAF.fullmatch(name) if isinstance(name, str) else None
    if not (isinstance(name, str) and (name.isidentifier() or (match and match["leaf"]))) or name in RESERVED:
        raise ExpressionError(f"leaves: expected a name such as 'D' or 'Diagonal<3, float64>', got {name!r}")


def _with_placeholders(source: str, leaves: Mapping[str, Expr | Entries]) -> tuple[str, dict[str, Expr | Entries]]:
    """The text with what leaves print as replaced by identifiers of the same length (so that places stay right)."""
    named = {name: leaf for name, leaf in leaves.items() if name.isidentifier()}
    made: dict[str, str] = {}

    def replace(match: re.Match[str]) -> str:
        shown = match["leaf"]
        if shown is None:  # a string: a parameter may be called anything
            return match[0]
        if shown not in leaves:
            before = source[: match.start()]
            line, column = before.count("\n") + 1, match.start() - (before.rfind("\n") + 1)
            message = f"an array leaf cannot be read from text; pass it: parse(text, leaves={{{shown!r}: leaf}})"
            raise ExpressionError(located(source, line, column, message))
        if shown not in made:
            number = len(made)
            while (name := f"L{number}".ljust(len(shown), "_")) in source or name in named:
                number += 1
            made[shown] = name
            named[name] = leaves[shown]
        return made[shown]

    return _STRING_OR_LEAF.sub(replace, source), named
