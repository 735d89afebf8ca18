"""The base of every expression: what a node is, and the operators that combine nodes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from curvalg.errors import ExpressionError, OptionError
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.scalars import as_coefficient

if TYPE_CHECKING:  # deferred imports: the two methods that reach upward, and the algebra built on this class
    from scipy.sparse.linalg import LinearOperator

    from curvalg.lowering.operator import CurvatureOperator
    from curvalg.problem import Problem

Space = Literal["parameters", "outputs"]


def too_deep() -> ExpressionError:
    """The error to raise where Python's stack was too short for an expression."""
    return ExpressionError(
        "the expression nests too deeply for Python's stack; put it together from fewer levels, or call from less deep "
        "a place in the program"
    )


def require_hashable(expr: Expr) -> None:
    """Raise ExpressionError for a term that cannot be hashed, so that equal ones could not be recognised."""
    try:
        hash(expr)
    except TypeError as error:
        raise ExpressionError(
            f"{type(expr).__name__} cannot be hashed ({error}); a term is a frozen dataclass with hashable options: "
            "@dataclass(frozen=True), and tuples instead of lists"
        ) from error


class Expr:
    """An unbound linear operator: it knows no model, no data and no torch.

    Expressions are immutable, hashable, comparable and picklable. They combine with ``+``, ``-``, ``@``, ``.T``,
    ``**`` (an integer) and multiplication or division by a real number. Calling :meth:`lower` with a
    :class:`~curvalg.Problem` makes a SciPy ``LinearOperator`` of them.

    >>> from curvalg import Identity, registry
    >>> print(2 * registry.build("hessian") / 3 + 1e-3 * Identity)
    2*hessian / 3 + 0.001*identity
    """

    domain: ClassVar[Space | None] = "parameters"
    """The space this operator acts on; None where it fits any (``Identity``, ``Zero``)."""
    codomain: ClassVar[Space | None] = "parameters"
    """The space its results lie in."""

    __array_ufunc__ = None  # NumPy scalars and arrays must defer to the operators below

    depth: ClassVar[int] = 1
    """How many nodes lie above one another, this one included."""

    @property
    def known(self) -> dict[Hashable, Any]:
        """What was found out about this node and is kept with it; no part of its value."""
        found: dict[Hashable, Any] = self.__dict__.setdefault("_known", {})
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_known"}

    @property
    def domain_params(self) -> tuple[str, ...] | None:
        """Patterns of the parameters that a restricted domain keeps; None for all."""
        return None

    @property
    def codomain_params(self) -> tuple[str, ...] | None:
        """Patterns of the parameters that a restricted codomain keeps; None for all."""
        return None

    @property
    def children(self) -> tuple[Expr, ...]:
        """The direct sub-expressions, in the order in which :meth:`rebuild` takes them."""
        return ()

    def walk(self) -> Iterator[Expr]:
        """Yield this expression and every expression inside it, each once, from the outside inwards.

        >>> from curvalg import Identity, inverse, registry
        >>> [type(node).__name__ for node in inverse(registry.build("ggn") + Identity).walk()]
        ['Inverse', 'Sum', 'GGN']
        """
        todo, seen = [self], set[Expr]()
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                yield node
                todo += reversed(node.children)

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        """The same kind of node with other children."""
        return self

    def transposed(self, of: Callable[[Expr], Expr]) -> Expr:
        """The transpose, written with the transposes of the children, which ``of`` gives.

        A node without children, or that knows no such form, is only marked as transposed.
        """
        return self.T

    def facts(self, loss: LossFacts | None = None) -> Facts:
        """What is known of this matrix, given the facts of the loss (None: of any loss)."""
        return Facts()

    # -- arithmetic -------------------------------------------------------------------------------------------------

    def __add__(self, other: Expr) -> Expr:
        return _add([(self, 1), (_operand(self, other, "+"), 1)])

    def __radd__(self, other: Any) -> Expr:
        if type(other) is int and other == 0:  # where Python's sum() starts
            return self
        raise _number_error(other, self, "+")

    def __sub__(self, other: Expr) -> Expr:
        return _add([(self, 1), (_operand(self, other, "-"), -1)])

    def __rsub__(self, other: Any) -> Expr:
        raise _number_error(other, self, "-")

    def __neg__(self) -> Expr:
        return _add([(self, -1)])

    def __pos__(self) -> Expr:
        return self

    def __mul__(self, other: Any) -> Expr:
        if isinstance(other, Expr):
            raise ExpressionError(
                f"* multiplies by a number; for the product of two operators write ({self}) @ ({other})"
            )
        return _add([(self, as_coefficient(other))])

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Expr:
        if isinstance(other, Expr):
            raise ExpressionError(f"/ divides by a number; write ({self}) @ inverse({other}) for a solve")
        divisor = as_coefficient(other)
        if divisor == 0:
            raise OptionError(f"cannot divide the operator {self} by zero")
        return _add([(self, 1 / divisor)])

    def __rtruediv__(self, other: Any) -> Expr:
        raise ExpressionError(f"{other!r} / ({self}) has no meaning for operators; write {other!r} * inverse({self})")

    def __matmul__(self, other: Expr) -> Expr:
        if not isinstance(other, Expr):
            raise ExpressionError(
                f"expected an expression right of @, got {type(other).__name__}: an unbound expression cannot be "
                "applied to a vector; write expr.lower(problem) @ vector"
            )
        from curvalg.expr.nodes.products import multiply

        return multiply([self, other])

    def __rmatmul__(self, other: Any) -> Expr:
        raise ExpressionError(
            f"expected an expression left of @, got {type(other).__name__}; write vector @ expr.lower(problem)"
        )

    def __pow__(self, exponent: int) -> Expr:
        from curvalg.expr.nodes.products import power

        return power(self, exponent)

    @property
    def T(self) -> Expr:
        """The transpose of this expression."""
        from curvalg.expr.nodes.transposes import transpose

        return transpose(self)

    # -- reaching upward ----------------------------------------------------------------------------------------------

    def simplify(self, loss: LossFacts | None = None) -> Expr:
        """The expression after all laws that apply: equal in value for every problem whose loss has these facts."""
        from curvalg.rewrite import simplify

        return simplify(self, loss).expr

    def lower(
        self,
        problem: Problem | Any,
        loss: Any = None,
        data: Any = None,
        *,
        preconditioner: Expr | LinearOperator | Callable[..., Any] | None = None,
        **options: Any,
    ) -> CurvatureOperator:
        """Bind the expression to a problem: a ``scipy.sparse.linalg.LinearOperator`` computed by torch.

        Only plans; passes over the data happen at the first product. ``expr.lower(model, loss, data, **options)`` is short for
        ``expr.lower(Problem(model, loss, data, **options))``; several operators share what is known of one Problem.

        Args:
            problem: model, loss, data and parameters; or the model alone, with the next two.
            loss, data, options: of the :class:`~curvalg.Problem` that is made of a model.
            preconditioner: for iterative inverses: an expression P, whose inverse is taken here; or what applies P⁻¹ itself, an
                operator (as SciPy's ``M``) or a callable ``v -> P⁻¹ v``.

        Raises:
            ExpressionError: the expression has no size of its own, or a node that cannot be lowered.
            LossError: a term is not defined for the problem's loss.
            ProblemError: as of :class:`~curvalg.Problem`, where one is made here.
        """
        from curvalg.lowering import lower

        try:
            return lower(self, problem, loss, data, preconditioner=preconditioner, **options)
        except RecursionError as error:
            raise too_deep() from error

    def bound(self, problem: Problem) -> Expr:
        """The expression with arrays in the place of everything that is computed from a model, a loss and data.

        What results is of no state, so that it never becomes stale: it may be lowered on the problem after a step, or on
        another one with the same parameters, added to, inverted, and written to a file by :func:`curvalg.save`. Matrix terms
        (``kfac``, ``ggn_diagonal``, ...), ``nystrom`` and ``diagonal_part`` become their arrays; terms known by products alone
        become dense matrices, up to 4096 rows each, as do their blocks.

        Args:
            problem: at whose present state arrays are made.

        Raises:
            ExpressionError: a term acts on outputs, or is known by its products alone and too large to be built.

        >>> import torch
        >>> from curvalg import Identity, Problem, inverse, registry
        >>> problem = Problem(torch.nn.Linear(3, 2), torch.nn.MSELoss(), (torch.randn(8, 3), torch.randn(8, 2)))
        >>> print(inverse(registry.build("ggn_diagonal") + 0.1 * Identity).bound(problem))
        inverse(Diagonal<8, float32> + 0.1*identity)
        """
        from curvalg.lowering import bound

        try:
            return bound(self, problem)
        except RecursionError as error:
            raise too_deep() from error

    if not TYPE_CHECKING:  # a checker sees the attributes that there are

        def __getattr__(self, name: str) -> Any:
            if name in ("shape", "dtype", "matvec", "matmat", "rmatvec"):  # what SciPy asks an operator for
                raise AttributeError(
                    f"an expression has no {name} before it knows a model and data: pass expr.lower(problem) in its place"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # -- printing -----------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        from curvalg.expr.show.text import text

        return text(self)

    def __repr__(self) -> str:
        return str(self)

    def tree(self) -> str:
        """The expression as an indented tree, one node a line."""
        from curvalg.expr.show.tree import tree

        return tree(self)

    def _repr_latex_(self) -> str:
        from curvalg.expr.show.latex import latex

        return f"${latex(self)}$"


# The algebra's nodes derive from Expr, so they can only be imported once this module is complete.


def _add(pairs: list[tuple[Expr, Any]]) -> Expr:
    from curvalg.expr.nodes.sums import add

    return add(pairs)


def _operand(left: Expr, right: Any, symbol: str) -> Expr:
    if not isinstance(right, Expr):
        raise _number_error(right, left, symbol)
    return right


def _number_error(number: Any, expr: Expr, symbol: str) -> ExpressionError:
    return ExpressionError(
        f"{symbol} with {type(number).__name__}: adding a number to an operator is ambiguous; "
        f"write A {symbol} {number!r} * Identity (A is {expr})"
    )
