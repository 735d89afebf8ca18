"""The matrix that is to be put into a structured form, and the form on offer."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeAlias
from weakref import WeakKeyDictionary

from curvalg.expr import Expr, Facts
from curvalg.lowering.blocks.chosen_entries import part_layout
from curvalg.lowering.blocks.output_rows import output_sizes
from curvalg.lowering.blocks.submatrices import inside
from curvalg.lowering.inverses.kronecker_spectra import Spectra, decompose_together
from curvalg.lowering.matrices import Structure
from curvalg.lowering.replayed import Repeatable
from curvalg.problem import Problem, Snapshot
from curvalg.rewrite import simplify
from curvalg.tensors.spaces import VectorSpace


class BoundMatrix:
    """A square matrix to be put into a structured form.

    Args:
        expr: the expression.
        problem: restricted already where the matrix is inside a restriction or a block.
        planner: gives the products of any expression on any problem.
        spectral: whether functions such as a square root are asked for, so that a form which gives solves only is none.
        found: forms that were found before, of this matrix and others.
    """

    def __init__(
        self,
        expr: Expr,
        problem: Problem,
        planner: Callable[[Expr, Problem], Repeatable],
        spectral: bool = False,
        found: Found | None = None,
    ) -> None:
        self.expr, self.problem, self._planner, self.spectral = expr, problem, planner, spectral
        self.found: Found = {} if found is None else found
        # Without functools.cached_property, whose lock is held while a problem is waited for.
        self._size: int | None = None
        self._plan: Repeatable | None = None

    @property
    def facts(self) -> Facts:
        """The facts of the matrix, given the loss."""
        return self.expr.facts(self.problem.facts)

    @property
    def size(self) -> int:
        """The number of rows."""
        if self._size is None:
            params = self.expr.domain_params
            if self.expr.domain == "outputs":
                self._size = output_sizes(self.problem, self.problem.snapshot()).total
            else:
                self._size = self.problem.size if params is None else part_layout(self.problem, params).size
        return self._size

    @property
    def vectors(self) -> VectorSpace:
        """The space of the vectors that it multiplies."""
        return self.problem.vectors if self.problem.group.sharded else VectorSpace(self.size)

    @property
    def plan(self) -> Repeatable:
        """The plan of products with this matrix."""
        if self._plan is None:
            self._plan = self._planner(self.expr, self.problem)
        return self._plan

    def localised(self) -> BoundMatrix:
        """The matrix on the problem over its own parameters, where it is a sub-matrix that allows this."""
        expr, problem = inside(self.expr, self.problem)
        return self if problem is self.problem else self.of(simplify(expr, problem.facts).expr, problem)

    def of(self, expr: Expr, problem: Problem | None = None, *, spectral: bool = False) -> BoundMatrix:
        """Another matrix, on the same problem or a restriction of it, for the same functions or more."""
        return BoundMatrix(expr, problem or self.problem, self._planner, self.spectral or spectral, self.found)


class Form:
    """A structured form on offer.

    Args:
        name: of the form.
        cost: predicted, in words.
        make: at a snapshot; made once for each.
        spectral: whether functions such as a square root can be taken, not only the inverse.
        singular: why the matrix certainly has no inverse, if so.
        rows: of the matrix that has to be built by products or factorised for it, beyond what a product with the matrix itself
            takes; 0 where its structure is given, and for inverses and square roots, whose products take it already.
        spectra: Kronecker products whose spectra it is made of.
        diagonal_rows: as ``rows``, where only the diagonal or the trace is asked for.
    """

    def __init__(
        self,
        name: str,
        cost: str,
        make: Callable[[Snapshot], Structure],
        *,
        spectral: bool = True,
        singular: str | None = None,
        spectra: Spectra = (),
        rows: int = 0,
        diagonal_rows: int | None = None,
    ) -> None:
        self.name, self.cost, self.spectral, self.singular, self._make = name, cost, spectral, singular, make
        self.rows, self.spectra = rows, spectra
        self.diagonal_rows = rows if diagonal_rows is None else diagonal_rows
        # Lives with the plan, and so with the operator: dampings tried one after the other do not pile up.
        self._made: WeakKeyDictionary[Snapshot, Structure] = WeakKeyDictionary()

    def at(self, snapshot: Snapshot) -> Structure:
        """The structured matrix at a snapshot."""
        with snapshot.lock:
            if snapshot not in self._made:
                decompose_together(self.spectra, snapshot)
                self._made[snapshot] = self._make(snapshot)
            return self._made[snapshot]


Found: TypeAlias = "dict[tuple[Hashable, ...], tuple[Form | None, list[str]]]"
"""Matrix and question -> the form that was found, and a line for each that declined before it."""

Offer = Form | str
OfferRule = Callable[[BoundMatrix], Offer]
