"""The first solves by conjugate gradients, where an exact form is worth its making only for many."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from curvalg.expr import Identity
from curvalg.expr.affine_form import affine
from curvalg.lowering.inverses.offer import Form
from curvalg.lowering.inverses.solver import InverseRequest, Solver
from curvalg.lowering.inverses.solver_kinds.iterative import Iterative, Operators
from curvalg.lowering.inverses.solver_kinds.structured import Prepared, Structured
from curvalg.lowering.inverses.verified import Oath
from curvalg.lowering.replayed import Repeatable
from curvalg.problem import Snapshot
from curvalg.problem.kept.race import Race
from curvalg.problem.kept.reads import Reads
from curvalg.solve import SolveResult, cg
from curvalg.solve.trail import Trail

LEAST = 16
"""Iterations below which it is not worth trying: few matrices are solved in fewer."""
SMALL = 1024
"""Rows below which a form is made in a moment."""
ROWS = {"gram": 32, "dense": 4}
"""Rows of a form that are made in the time of a product with one column, measured on perceptrons and convolutions."""
STRICTER = 0.1
"""Times the tolerance: what a form gives is better than its tolerance, too."""


@dataclass
class Spent:
    """What solves at one state have taken, with all dampings of a matrix: most of their forms' making is the same."""

    products: int = 0
    made: bool = False
    """Whether the form of one damping is."""


@dataclass
class Waiting:
    """A state at which the form is made once it pays."""

    snapshot: Snapshot
    operators: Operators
    spent: Spent
    form: Prepared | None = None


class FewSolves(Solver[Waiting]):
    """Conjugate gradients until they have taken about as long as an exact form takes to be made, and that from then on.

    One solve costs one solve, many at most about twice the form: as with skis, rented until the rent has come to their price
    (Karlin et al., Competitive snoopy caching, 1988). Products are counted, not timed: all runs and processes choose alike.
    Where conjugate gradients were not there in time, later states begin with the form.

    Args:
        request: the inverse.
        exact: the solver by the form.
    """

    def __init__(self, request: InverseRequest, exact: Structured) -> None:
        self.request, self.exact, self.name = request, exact, exact.name
        self.price = _price(exact.form)
        """Products that take about as long as making the form."""
        measured = request.problem.measured
        self._race: Race[str] = Race(measured, measured.name("first solves", request.node))
        self.cost = (
            f"{exact.cost}; made once solves by cg have taken {self.price} products, which takes about as long: the first "
            f"ones are by cg, to a relative residual of {STRICTER * request.rtol:g}"
        )

    @staticmethod
    def fits(request: InverseRequest, exact: Structured) -> bool:
        """Whether a solve may take fewer products than the form, and the matrix is one for conjugate gradients."""
        return _price(exact.form) > 0 and request.node.solver == "auto" and bool(request.facts.positive_definite)

    def prepare(self, snapshot: Snapshot) -> Waiting:
        problem, expr = self.request.problem, self.request.matrix.expr
        undamped = expr - affine(expr)[1] * Identity
        spent = problem.cached(snapshot).get("solves", undamped, Spent)
        return Waiting(snapshot, self._by_products(LEAST).prepare(snapshot), spent)

    def solve(
        self, state: Waiting, b: Tensor, x0: Tensor | None, trail: Trail | None = None, report: bool = True
    ) -> SolveResult:
        """Solve A X = B; the form starts from nothing."""
        done = 0 if trail is None or trail.start is None else int(trail.start.tensors["iterations"].sum())
        iterations, first = self._iterations(state, b.shape[1], begun=done > 0), not state.spent.products
        if iterations:
            result = self._by_products(iterations).solve(state.operators, b, x0, trail, report)
            state.spent.products += int(result.iterations.sum()) - done
            if result.ok or result.partial:
                return result
            if first:  # on what others have left they may not get there, and at another state do
                self._race.decide(self.exact.name)
        return self.exact.solve(self._made(state), b, None, trail, report)

    def trusts(self, state: Waiting) -> bool:
        return state.form is not None and self.exact.trusts(state.form)

    def apply(self, state: Waiting, b: Tensor) -> Tensor:
        return self.exact.apply(self._made(state), b)

    def reads(self, state: Waiting) -> Reads | str:
        return super().reads(state) if state.form is None else self.exact.reads(state.form)

    def multiplies(self, state: Waiting) -> Repeatable | None:
        return state.operators.matrix if state.form is None else None

    def approximate(self, state: Waiting, b: Tensor) -> Tensor:
        """Apply A⁻¹ by the form: a preconditioner is one fixed linear map."""
        return self.exact.approximate(self._made(state), b)

    def oaths(self, state: Waiting) -> list[Oath]:
        return [] if state.form is None else self.exact.oaths(state.form)

    def _iterations(self, state: Waiting, columns: int, begun: bool) -> int:
        """The iterations that conjugate gradients are given for so many columns; 0: it is time for the form.

        A solve that was begun by them and interrupted goes on: its iterations have counted already.
        """
        coming = max(columns, self.request.problem.measured.expected.announced)
        left = self.price if begun else self.price - state.spent.products
        if state.spent.made or self._race.known is not None or left < LEAST * coming:
            return 0
        return min(left // columns, self.request.maxiter)

    def _made(self, state: Waiting) -> Prepared:
        if state.form is None:
            state.form, state.spent.made = self.exact.prepare(state.snapshot), True
        return state.form

    def _by_products(self, iterations: int) -> Iterative:
        asked = self.request.node
        node = replace(asked, rtol=STRICTER * self.request.rtol, atol=STRICTER * float(asked.atol), maxiter=iterations)
        # Without a preconditioner: making it may take longer than the form does, and is in no price.
        return Iterative(replace(self.request, node=node, preconditioner=None), "cg", cg)


def _price(form: Form) -> int:
    return form.rows // ROWS[form.name] if form.name in ROWS else 0
