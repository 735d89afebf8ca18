"""Block-diagonal matrices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from curvalg.errors import ExpressionError, OptionError
from curvalg.expr.facts import Facts, LossFacts, all_of
from curvalg.expr.node import Expr
from curvalg.expr.nodes.composite import Composite, Side, as_patterns, require_endomorphism


@dataclass(frozen=True, repr=False)
class Block:
    """One block of a block-diagonal matrix.

    Args:
        params: names or glob patterns of the parameters of this block, in its order.
        expr: the matrix over these parameters.
        joint: the block is laid out as the columns of [W | b] (weight and bias side by side) instead of one
            parameter after the other.
    """

    params: tuple[str, ...]
    expr: Expr
    joint: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", as_patterns(self.params))
        if not isinstance(self.expr, Expr):
            raise ExpressionError(f"a block holds an expression, got {type(self.expr).__name__}")

    @property
    def anchored(self) -> bool:
        """Whether it holds a sub-matrix of what surrounds the block-diagonal, so that it means nothing elsewhere."""
        return self.expr.domain_params is not None

    def __repr__(self) -> str:
        from curvalg.expr.show.text import text_block

        return text_block(self)


Partition = Literal["parameter", "module"] | tuple[tuple[str, ...], ...]


@dataclass(frozen=True, repr=False, eq=False)
class BlockDiagonal(Composite):
    """A block-diagonal matrix; made by :func:`block_diagonal`.

    Either the diagonal blocks of one expression (``what`` an expression, ``by`` the partition), or given blocks
    (``what`` a tuple of :class:`Block`, ``by`` None). The order of given blocks does not count.

    ``complete``: its blocks are known to cover every parameter exactly once, each named by its full name (set when an
    expression is bound to a problem; inside a block, every parameter of that block). Not printed.
    """

    what: Expr | tuple[Block, ...]
    by: Partition | None = "parameter"
    complete: bool = False

    def content(self, of: Callable[[Expr], Hashable]) -> Hashable:
        if isinstance(self.what, Expr):
            return of(self.what), self.by, self.complete
        blocks = Counter((block.params, of(block.expr), block.joint) for block in self.what)
        return frozenset(blocks.items()), self.by, self.complete

    @property
    def covering(self) -> bool:
        """Whether every parameter lies in a block; what no block covers is zero."""
        return self.complete or self.by in ("parameter", "module")

    def find_sides(self) -> tuple[Side, Side]:
        side: Side = "parameters", self.what.domain_params if isinstance(self.what, Expr) else None
        return side, side

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.what,) if isinstance(self.what, Expr) else tuple(block.expr for block in self.what)

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        if isinstance(self.what, Expr):
            return BlockDiagonal(children[0], self.by, self.complete)
        blocks = zip(self.what, children, strict=True)
        return BlockDiagonal(tuple(Block(b.params, child, joint=b.joint) for b, child in blocks), None, self.complete)

    def transposed(self, of: Callable[[Expr], Expr]) -> Expr:
        return self.rebuild(tuple(of(child) for child in self.children))

    def find_facts(self, loss: LossFacts | None) -> Facts:
        parts = [child.facts(loss) for child in self.children]
        # Principal blocks inherit what holds; what fails for the whole may still hold for each block.
        return Facts(
            symmetric=all_of(f.symmetric for f in parts) or None,
            psd=all_of(f.psd for f in parts) or None,
            positive_definite=(self.covering and all_of(f.positive_definite for f in parts)) or None,
        )


def block_diagonal(
    what: Expr | Mapping[str, Expr] | Sequence[Block],
    *,
    by: Literal["parameter", "module"] | Sequence[Sequence[str]] = "parameter",
) -> Expr:
    """The block-diagonal part of an expression, or a matrix put together from blocks.

    Args:
        what: an expression; or a mapping from name patterns to expressions; or a list of :class:`Block`.
        by: for an expression: one block per "parameter", per "module", or per group of names or glob patterns.

    Raises:
        ExpressionError: not an endomorphism of parameter space, or nothing to put together.

    >>> from curvalg import block_diagonal, registry
    >>> print(block_diagonal(registry.build("ggn"), by="module"))
    block_diagonal(ggn, by='module')
    """
    if isinstance(what, Expr):
        require_endomorphism(what, "block_diagonal")
        if isinstance(by, str):
            if by not in ("parameter", "module"):
                raise OptionError(f"by is 'parameter', 'module' or groups of names, got {by!r}")
            return BlockDiagonal(what, by)  # type: ignore[arg-type]
        if not isinstance(by, Iterable) or not (groups := tuple(as_patterns(group) for group in by)):
            raise OptionError(f"by is 'parameter', 'module' or groups of names, got {by!r}")
        return BlockDiagonal(what, groups)
    if by != "parameter":
        raise OptionError("by= partitions an expression; given blocks name their own parameters")
    if isinstance(what, Mapping):
        blocks = tuple(Block((pattern,), expr) for pattern, expr in what.items())
    else:
        blocks = tuple(what) if isinstance(what, Iterable) else ()
    if not blocks or not all(isinstance(block, Block) for block in blocks):
        raise OptionError("block_diagonal() takes an expression, a mapping {pattern: expression} or a list of Block")
    for block in blocks:
        require_endomorphism(block.expr, "block_diagonal")
    return BlockDiagonal(blocks, None)
