"""The rewrite engine: laws applied bottom-up until none fires."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curvalg.errors import ExpressionError
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr

Apply = Callable[[Any, LossFacts | None], Expr | None]
"""The right side of a law for a node that is an instance of its left side, else None."""


@dataclass(frozen=True)
class Law:
    """An exact and unconditional equality, read from left to right.

    Args:
        name: in words.
        statement: the equality, for people.
        on: the kind of node that the left side is; others never ask the law.
        apply: the right side for such a node that is an instance of the left side, else None. May use the facts of the loss.
        witnesses: w -> expressions over the stand-in matrices of w on which the law must fire and hold numerically.
        loss: facts of the loss under which the witnesses are taken.
    """

    name: str
    statement: str
    on: type[Expr] | tuple[type[Expr], ...]
    apply: Apply
    witnesses: Callable[[Any], Sequence[Expr]]
    loss: LossFacts | None = None

    def right(self, node: Expr, loss: LossFacts | None = None) -> Expr | None:
        """The right side for a node that is an instance of the left side, else None."""
        return self.apply(node, loss) if isinstance(node, self.on) else None


@dataclass(frozen=True)
class Step:
    """One law that was applied."""

    law: str
    before: Expr
    after: Expr


@dataclass(frozen=True)
class Rewritten:
    """A simplified expression and the laws that led to it."""

    expr: Expr
    steps: tuple[Step, ...]


# Laws only ever shrink or push inward, so this is far out of reach; it turns a pair of laws that undo each other into
# an error instead of an endless loop.
_MOST_STEPS = 10_000


def rewrite(expr: Expr, laws: Sequence[Law], loss: LossFacts | None = None) -> Rewritten:
    """Apply laws to an expression and all its parts, innermost first, until none fires.

    Args:
        expr: any expression.
        laws: tried in their order at every node.
        loss: facts of the loss that some laws depend on.

    Raises:
        ExpressionError: the laws do not terminate.
    """
    steps: list[Step] = []
    done: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Iterator[Expr]:
        """Yields what has to be done before it, and goes on when that is."""
        yield from node.children
        result = node.rebuild(visited) if (visited := _changed(node, done)) else node
        if visited and result.children != visited:  # 2*(B @ C) of B @ (2*C): a product that no law has seen yet
            yield result
            result = done[result]
        else:
            for law in laws:
                after = law.right(result, loss)
                if after is not None and after != result:
                    steps.append(Step(law.name, result, after))
                    if len(steps) > _MOST_STEPS:
                        raise ExpressionError(f"the laws do not terminate on {expr}; the last one was {law.name!r}")
                    yield after
                    result = done[after]
                    break
        done[node] = result

    _run(expr, visit, done)
    return Rewritten(done[expr], tuple(steps))


def _changed(node: Expr, done: Mapping[Expr, Expr]) -> tuple[Expr, ...]:
    """The children that have changed, or nothing."""
    visited = tuple(done[child] for child in node.children)
    return () if all(new is old for new, old in zip(visited, node.children, strict=True)) else visited


def _run(expr: Expr, visit: Callable[[Expr], Iterator[Expr]], done: Mapping[Expr, Expr]) -> None:
    """Run a recursion on a stack of its own: Python's is too short for deep expressions."""
    stack = [visit(expr)]
    while stack:
        needed = next(stack[-1], None)
        if needed is None:
            stack.pop()
        elif needed not in done:
            stack.append(visit(needed))
