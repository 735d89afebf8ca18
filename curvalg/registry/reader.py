"""The reader from Python's syntax tree to an expression: which syntax is allowed and what it means."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NoReturn

from curvalg.errors import CurvalgError, ExpressionError, OptionError, RegistryError, TermOptionError
from curvalg.expr import (
    Block,
    Entries,
    Expr,
    Identity,
    Zero,
    ZeroExpr,
    as_coefficient,
    block_diagonal,
    diagonal_part,
    inv_sqrt,
    inverse,
    nystrom,
    restrict,
    sqrt,
)
from curvalg.registry.arithmetic import OPERATIONS, arithmetic
from curvalg.registry.messages import ALLOWED, located
from curvalg.registry.registry import Registry
from curvalg.registry.spec import RESERVED

MAX_DEPTH = 100
"""How deep expressions may nest. Each level takes some of Python's own stack, of which the caller uses a part."""
MAX_POWER = 1000
"""The largest exponent; each unit is a factor of the product."""


class Reader:
    """Turns a syntax tree into an expression (or, on the way, into exact numbers)."""

    def __init__(self, source: str, leaves: Mapping[str, Expr | Entries], registry: Registry) -> None:
        self.source = source
        self.leaves = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Expr)}
        self.entries = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Entries)}
        self.registry = registry
        self.depth = 0
        self.calls: dict[str, Callable[[ast.Call], Expr]] = {
            "inverse": self._inverse,
            "sqrt": self._root,
            "inv_sqrt": self._root,
            "restrict": self._restrict,
            "diagonal_part": self._diagonal_part,
            "nystrom": self._nystrom,
            "block_diagonal": self._block_diagonal,
            "zero": self._zero,
            "Zero": self._zero,
            "term": self._term,
        }

    # -- messages ------------------------------------------------------------------------------------------------------

    def _place(self, node: ast.AST, message: str) -> str:
        line, offset = getattr(node, "lineno", 1), getattr(node, "col_offset", 0)
        # Offsets count UTF-8 bytes; placeholders are ASCII, and as long as what they stand for.
        encoded = self.source.split("\n")[line - 1].encode()
        return located(self.source, line, len(encoded[:offset].decode(errors="ignore")), message)

    def fail(self, node: ast.AST, message: str) -> NoReturn:
        raise ExpressionError(self._place(node, message))

    @contextmanager
    def at(self, node: ast.AST) -> Iterator[None]:
        """Adds the place to what the algebra or the registry refuses. Wraps their calls alone, never a reading."""
        try:
            yield
        except CurvalgError as error:
            kinds = (TermOptionError, RegistryError, OptionError)
            kind = next((kind for kind in kinds if isinstance(error, kind)), ExpressionError)
            raise kind(self._place(node, str(error))) from error

    # -- expressions ---------------------------------------------------------------------------------------------------

    def read(self, node: ast.expr) -> Expr:
        """The operator that a node denotes."""
        value = self.value(node)
        if isinstance(value, Fraction):
            self.fail(node, "a number alone is no operator; write 2*identity for a multiple of the identity")
        return value

    def value(self, node: ast.expr) -> Expr | Fraction:
        """The operator or number that a node denotes."""
        if self.depth >= MAX_DEPTH:
            self.fail(node, f"the expression nests too deeply, at most {MAX_DEPTH} levels")
        self.depth += 1
        try:
            if isinstance(node, ast.BinOp):
                return self._chain(node)
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
                operand = self.value(node.operand)
                return -operand if isinstance(node.op, ast.USub) else operand
            if isinstance(node, ast.Constant):
                return self._number(node)
            if isinstance(node, ast.Name):
                return self._name(node)
            if isinstance(node, ast.Call):
                return self._call(node)
            if isinstance(node, ast.Attribute):
                return self._transpose(node)
            self.fail(node, f"this is not part of an expression; {ALLOWED}")
        finally:
            self.depth -= 1

    def _number(self, node: ast.Constant) -> Fraction:
        if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
            self.fail(node, f"expected a term or a real number, got {node.value!r}; {ALLOWED}")
        with self.at(node):
            return as_coefficient(node.value)

    def _name(self, node: ast.Name) -> Expr:
        if node.id in self.leaves:
            return self.leaves[node.id]
        if node.id in self.entries:
            self.fail(node, "entries are no operator; they are the second argument of restrict(expression, entries)")
        if node.id in ("identity", "Identity"):
            return Identity
        if node.id in ("zero", "Zero"):
            return Zero
        if node.id in RESERVED or node.id in self.calls:
            self.fail(node, f"{node.id!r} is a word of the syntax and no term; {ALLOWED}")
        with self.at(node):
            return self.registry.build(node.id)

    def _transpose(self, node: ast.Attribute) -> Expr:
        if node.attr != "T":
            start = (node.end_col_offset or 0) - len(node.attr.encode())
            name = ast.Name(node.attr, lineno=node.end_lineno or 1, col_offset=start)
            self.fail(name, f"expected .T, got .{node.attr}: the transpose is the only attribute of an expression")
        value = self.value(node.value)
        if isinstance(value, Fraction):
            self.fail(node, "a number has no transpose")
        return value.T

    # -- arithmetic ----------------------------------------------------------------------------------------------------

    def _chain(self, node: ast.BinOp) -> Expr | Fraction:
        # A sum of many terms leans to the left: walk down that side in a loop, not by recursion.
        pending = [node]
        while isinstance(pending[-1].left, ast.BinOp):
            pending.append(pending[-1].left)
        value = self.value(pending[-1].left)
        for step in reversed(pending):
            value = self._combine(step, value, self.value(step.right))
        return value

    def _combine(self, node: ast.BinOp, left: Expr | Fraction, right: Expr | Fraction) -> Expr | Fraction:
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            with self.at(node.right):
                return arithmetic(node.op, left, right)
        operation = node.op
        if isinstance(operation, (ast.Add, ast.Sub)):
            for side, value in ((node.left, left), (node.right, right)):
                if isinstance(value, Fraction):
                    number = ast.unparse(side)
                    self.fail(
                        side, f"adding a number to an operator is ambiguous; write {number}*identity for the shift"
                    )
        elif isinstance(operation, ast.Div) and isinstance(left, Fraction):
            self.fail(node.left, "a number divided by an operator has no meaning; write c * inverse(A)")
        elif isinstance(operation, ast.MatMult) and (isinstance(left, Fraction) or isinstance(right, Fraction)):
            self.fail(node.left if isinstance(left, Fraction) else node.right, "@ joins two operators; scale by *")
        elif isinstance(operation, ast.Pow):
            return self._power(node, left, right)
        apply = OPERATIONS.get(type(operation))
        if apply is None:
            self.fail(node.right, f"{type(operation).__name__} is no operation on operators; {ALLOWED}")
        with self.at(node.right):
            result: Expr = apply(left, right)
            return result

    def _power(self, node: ast.BinOp, left: Expr | Fraction, right: Expr | Fraction) -> Expr:
        if isinstance(left, Fraction) or not isinstance(right, Fraction) or right.denominator != 1:
            self.fail(node.right, "a power is an operator ** an integer")
        if abs(right) > MAX_POWER:
            self.fail(node.right, f"expected an exponent of at most {MAX_POWER}, got {right}")
        with self.at(node):
            return left ** int(right)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _call(self, node: ast.Call) -> Expr:
        if not isinstance(node.func, ast.Name):
            self.fail(node.func, f"only a name can be called; {ALLOWED}")
        name = node.func.id
        if name in self.calls:
            return self.calls[name](node)
        if name in self.leaves or name in RESERVED:
            self.fail(node, f"{name!r} takes no options here; {ALLOWED}")
        self._arguments(node, (), f"{name}(option=value): options are given by name")
        options = self._options(node)
        with self.at(node):
            return self.registry.build(name, **options)

    def _arguments(self, node: ast.Call, names: tuple[str, ...], form: str) -> list[ast.expr]:
        """What is given for the parameters of these names, by place or by name, as Python's call of the function takes it."""
        for number, argument in enumerate(node.args):
            if isinstance(argument, ast.Starred) or number >= len(names):
                self.fail(argument, f"expected {form}")
        given = dict(zip(names, node.args, strict=False))
        for keyword in node.keywords:
            if keyword.arg in given:
                self.fail(keyword, f"{keyword.arg!r} is given twice; expected {form}")
            if keyword.arg in names:
                given[keyword.arg] = keyword.value
        if len(given) < len(names):
            self.fail(node, f"expected {form}")
        return [given[name] for name in names]

    def _options(
        self, node: ast.Call, allowed: tuple[str, ...] | None = None, besides: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """The options by name, without the parameters ``besides``, which :meth:`_arguments` takes."""
        options: dict[str, Any] = {}
        for keyword in node.keywords:
            name = keyword.arg
            if name in besides:
                continue
            if name is None or name in options or (allowed is not None and name not in allowed):
                what = "**" if name is None else name
                known = f"its options are {', '.join(allowed)}" if allowed else "each option once, as option=value"
                self.fail(keyword, f"unexpected {what!r}: {known}")
            options[name] = self._literal(keyword.value)
        return options

    def _inverse(self, node: ast.Call) -> Expr:
        (inner,) = self._arguments(node, ("expr",), "inverse(expression, option=value)")
        expr = self.read(inner)
        allowed = ("solver", "rtol", "atol", "maxiter", "preconditioner", "on_fail", "check")
        options = self._options(node, allowed, ("expr",))
        with self.at(node):
            return inverse(expr, **options)

    def _restrict(self, node: ast.Call) -> Expr:
        names = "expr", "params"
        inner, params = self._arguments(node, names, "restrict(expression, 'name') or restrict(expression, ['a', 'b'])")
        expr = self.read(inner)
        self._options(node, (), names)
        entries = self.entries.get(params.id) if isinstance(params, ast.Name) else None
        patterns = self._literal(params) if entries is None else entries
        with self.at(params):
            return restrict(expr, patterns)

    def _root(self, node: ast.Call) -> Expr:
        name = node.func.id  # type: ignore[attr-defined]
        (inner,) = self._arguments(node, ("expr",), f"{name}(expression)")
        expr = self.read(inner)
        self._options(node, (), ("expr",))
        with self.at(node):
            return sqrt(expr) if name == "sqrt" else inv_sqrt(expr)

    def _diagonal_part(self, node: ast.Call) -> Expr:
        (inner,) = self._arguments(node, ("expr",), "diagonal_part(expression, probes=..., seed=...)")
        expr = self.read(inner)
        options = self._options(node, ("probes", "seed"), ("expr",))
        with self.at(node):
            return diagonal_part(expr, **options)

    def _nystrom(self, node: ast.Call) -> Expr:
        names = "expr", "rank"
        inner, second = self._arguments(node, names, "nystrom(expression, rank, seed=...)")
        expr, rank = self.read(inner), self._literal(second)
        options = self._options(node, ("seed",), names)
        with self.at(node):
            return nystrom(expr, rank, **options)

    def _zero(self, node: ast.Call) -> Expr:
        form = "zero, or zero('codomain', 'domain') of the spaces 'parameters' and 'outputs'"
        names = "codomain", "domain"
        spaces = [self._literal(arg) for arg in self._arguments(node, names, form)]
        options = self._options(node, ("codomain_params", "domain_params"), names)
        if not all(space in ("parameters", "outputs") for space in spaces):
            self.fail(node, f"expected {form}")
        with self.at(node):
            return ZeroExpr(spaces[0], spaces[1], **options)

    def _term(self, node: ast.Call) -> Expr:
        (first,) = self._arguments(node, ("name",), "term('distribution/name', option=value)")
        name = self._literal(first)
        options = self._options(node, besides=("name",))
        with self.at(first):
            return self.registry.build(name, **options)

    def _block_diagonal(self, node: ast.Call) -> Expr:
        form = "block_diagonal(e, by=...), block_diagonal({'name': e}) or block_diagonal([block('name', e)])"
        (first,) = self._arguments(node, ("what",), form)
        what: Any
        if isinstance(first, ast.Dict):
            what = self._mapping(first)
        elif isinstance(first, (ast.List, ast.Tuple)):
            what = [self._block(item) for item in first.elts]
        else:
            what = self.read(first)
        options = self._options(node, ("by",), ("what",))
        with self.at(node):
            return block_diagonal(what, **options)

    def _mapping(self, node: ast.Dict) -> dict[str, Expr]:
        mapping: dict[str, Expr] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            name = None if key is None else self._literal(key)
            if not isinstance(name, str) or name in mapping:
                self.fail(key or value, "expected each block's parameter name once, as a string: {'head.*': e}")
            mapping[name] = self.read(value)
        return mapping

    def _block(self, node: ast.expr) -> Block:
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "block"):
            self.fail(node, "expected block(['a', 'b'], e) or block('a', e, joint=True)")
        arguments = "params", "expr"
        params, inner = self._arguments(node, arguments, "block(['a', 'b'], e, joint=True)")
        patterns, expr = self._literal(params), self.read(inner)
        joint = self._options(node, ("joint",), arguments).get("joint", False)
        if not isinstance(joint, bool):
            self.fail(node, f"joint is True or False, got {joint!r}")
        with self.at(node):
            return Block(patterns, expr, joint=joint)

    # -- option values -------------------------------------------------------------------------------------------------

    def _literal(self, node: ast.expr) -> Any:
        """A Python literal (numbers as Python has them, unlike coefficients), or an expression."""
        if isinstance(node, ast.Constant):
            if isinstance(node.value, (str, int, float, bool, type(None))):
                return node.value
            self.fail(node, f"expected a string, number, True, False, None, tuple or list, got {node.value!r}")
        if isinstance(node, (ast.Tuple, ast.List)):
            items = [self._literal(item) for item in node.elts]
            return tuple(items) if isinstance(node, ast.Tuple) else items
        if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
            return math.inf if node.id == "inf" else math.nan
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
            value = self._literal(node.operand)
            if isinstance(value, (int, float, Expr)) and not isinstance(value, bool):
                return -value if isinstance(node.op, ast.USub) else value
        value = self.value(node)
        if isinstance(value, Fraction):
            self.fail(node, "expected a literal such as 0.5, not arithmetic")
        return value
