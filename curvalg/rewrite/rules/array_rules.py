"""Sums and products of array leaves that are a leaf of the same kind.

By operators only, so that torch tensors and NumPy arrays are treated alike; arrays of different kinds are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from itertools import groupby
from typing import Any

from curvalg.expr import ArrayLeaf, Diagonal, Eigenbasis, Identity, Kronecker, Product, Sum, add, multiply
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr

LEAST, MOST = Fraction(1, 10**30), Fraction(10**30)
"""Coefficients between them are within the range of single precision."""

Scaled = tuple[Any, Fraction]


def _kind(leaf: ArrayLeaf) -> Hashable | None:
    """Library, dtype and device of a leaf's arrays; None where they differ or are not of single or double precision."""
    kinds = {
        (type(a).__module__.partition(".")[0], str(a.dtype).removeprefix("torch."), str(getattr(a, "device", "")))
        for a in leaf.numbers
    }
    kind = kinds.pop()
    return None if kinds or kind[1] not in ("float32", "float64") else kind


def _diagonals(expr: Expr) -> Hashable | None:
    """A key that is equal for two diagonal matrices that can be added and multiplied."""
    kind = _kind(expr) if isinstance(expr, Diagonal) else None
    return None if kind is None else (kind, expr.size)  # type: ignore[attr-defined]


def _eigenbases(expr: Expr) -> Hashable | None:
    """A key that is equal for two matrices in one eigenbasis: the same Kronecker leaf, or an array of the same numbers."""
    if not isinstance(expr, Eigenbasis) or (kind := _kind(expr)) is None:
        return None
    return kind, expr.basis if isinstance(expr.basis, Kronecker) else expr.digest


def _kroneckers(expr: Expr) -> Hashable | None:
    """A key that is equal for two Kronecker products that multiply factor by factor."""
    if not isinstance(expr, Kronecker) or (kind := _kind(expr)) is None:
        return None
    return kind, expr.arrangement, tuple(factor.shape[-1] for factor in expr.factors)


# -- sums ---------------------------------------------------------------------------------------------------------------


def sum_of_diagonals(expr: Sum, loss: LossFacts | None) -> Expr | None:
    return _sum(expr, _diagonals, shifted=False)


def sum_of_eigenbases(expr: Sum, loss: LossFacts | None) -> Expr | None:
    return _sum(expr, _eigenbases, shifted=True)


def _sum(expr: Sum, key: Callable[[Expr], Hashable | None], shifted: bool) -> Expr | None:
    """Leaves with one key become one leaf; with ``shifted``, the shift too if nothing else is in the sum."""
    groups: dict[Hashable, list[Scaled]] = {}
    for part, c in expr.coefficients.items():
        if (shared := key(part)) is not None:
            groups.setdefault(shared, []).append((part, c))
    pairs: list[tuple[Expr, Any]] = [(part, c) for part, c in expr.coefficients.items() if key(part) is None]
    shift, changed = expr.shift, False
    for operands in groups.values():
        inside = shift if shifted and len(operands) == len(expr.coefficients) else Fraction(0)
        one = len(operands) == 1 and operands[0][1] == 1 and not inside
        scalars = [c for _, c in operands] + ([inside] if inside else [])
        if one or not all(LEAST < abs(c) < MOST for c in scalars):
            pairs += operands
            continue
        pairs.append((_linear(operands, inside), 1))
        shift, changed = shift - inside, True
    return add([*pairs, (Identity, shift)]) if changed else None


def _linear(operands: Sequence[Scaled], shift: Fraction) -> Expr:
    operands = sorted(operands, key=lambda operand: operand[0].token)
    values = sum(float(c) * leaf.values for leaf, c in operands)
    if shift:
        values = values + float(shift)
    history: dict[str, Fraction] = {"identity": shift} if shift else {}
    for leaf, c in operands:
        for token, weight in _operands(leaf, "sum"):
            history[token] = history.get(token, Fraction(0)) + c * weight
    leaf = operands[0][0]
    arrays = [values] if isinstance(leaf, Diagonal) else [leaf.basis, values]
    made: Expr = type(leaf).derived(arrays, "sum", sorted(history.items()))
    return made


def _operands(leaf: ArrayLeaf, operation: str) -> tuple[tuple[str, Fraction], ...]:
    """The operands of a leaf made by an operation, so that doing it step by step gives what doing it at once gives."""
    if leaf.history is not None and leaf.history[0] == operation:
        return leaf.history[1]
    return ((leaf.token, Fraction(1)),)


# -- products -----------------------------------------------------------------------------------------------------------


def product_of_diagonals(expr: Product, loss: LossFacts | None) -> Expr | None:
    return _product(expr, _diagonals, lambda run, history: Diagonal.derived([_values(run)], "product", sorted(history)))


def product_of_eigenbases(expr: Product, loss: LossFacts | None) -> Expr | None:
    def make(run: Sequence[Any], history: Sequence[tuple[str, Fraction]]) -> Expr:
        first = min(run, key=lambda leaf: leaf.token)
        return Eigenbasis.derived([first.basis, _values(run)], "product", sorted(history))

    return _product(expr, _eigenbases, make)


def product_of_kroneckers(expr: Product, loss: LossFacts | None) -> Expr | None:
    def make(run: Sequence[Any], history: Sequence[tuple[str, Fraction]]) -> Expr:
        factors = list(run[0].factors)
        for leaf in run[1:]:
            factors = [left @ right for left, right in zip(factors, leaf.factors, strict=True)]
        return Kronecker.derived(factors, "product", history, origin=multiply(run), order=run[0].order)

    return _product(expr, _kroneckers, make)


def _values(run: Sequence[Any]) -> Any:
    first, *rest = sorted(run, key=lambda leaf: leaf.token)
    values = first.values
    for leaf in rest:
        values = values * leaf.values
    return values


def _product(
    expr: Product,
    key: Callable[[Expr], Hashable | None],
    make: Callable[[Sequence[Any], Sequence[tuple[str, Fraction]]], Expr],
) -> Expr | None:
    """Neighbours with one key become one leaf."""
    factors: list[Expr] = []
    for shared, group in groupby(expr.factors, key):
        run = list(group)
        merge = shared is not None and len(run) > 1
        factors += [make(run, [entry for leaf in run for entry in _operands(leaf, "product")])] if merge else run  # type: ignore[arg-type]
    return multiply(factors) if len(factors) < len(expr.factors) else None
