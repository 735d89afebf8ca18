"""The subject of checks: a term, on every problem that it is defined for."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from curvalg import registry
from curvalg.errors import ConformanceError, ExpressionError, LossError, ProblemError, RegistryError
from curvalg.expr import Expr, NamedExpr
from curvalg.problem import Problem
from curvalg.registry.parse import parse
from curvalg.rewrite import simplify
from curvalg.tensors.random_numbers import normals
from curvalg.testing.outcome import Failure, NotApplicable
from curvalg.testing.place import place
from curvalg.testing.problems import PROBLEMS, make
from curvalg.testing.variants import variant

COLUMNS = 16
"""Columns in one backward pass, fixed so that nothing is measured."""

Dense = Callable[[Problem], Tensor]
Check = Callable[["Subject"], None]


@dataclass
class Case:
    """The term on one problem.

    Args:
        term: the term.
        problem: the problem.
        name: what messages call the problem.
        reference: problem -> dense matrix, where the author gave one.
    """

    term: Expr
    problem: Problem
    name: str
    reference: Dense | None = None

    @functools.cached_property
    def matrix(self) -> Tensor:
        """The dense matrix of the term, by its products."""
        return self.dense(self.term)

    @functools.cached_property
    def transpose(self) -> Tensor | None:
        """The dense matrix of ``term.T``; None where there is no rule for it, as for a term that projects."""
        loss = self.problem.facts
        if simplify(self.term.T, loss).expr == simplify(self.term, loss).expr:
            return self.matrix  # as the facts have it
        try:
            return self.dense(self.term.T)
        except ExpressionError:
            return None

    @functools.cached_property
    def twin(self) -> Problem:
        """The problem on which dense matrices are made; without recordings, which pay off over more products only."""
        return variant(self.problem, cache=0, columns=COLUMNS)

    @functools.cached_property
    def keeping(self) -> Problem:
        """The problem on which single products are made; it keeps its recordings."""
        return variant(self.problem, columns=COLUMNS)

    def dense(self, expr: Expr) -> Tensor:
        """The dense matrix of an expression on this problem."""
        return expr.lower(self.twin).to_dense()

    def vectors(self, columns: int, seed: int = 0, rows: int | None = None) -> Tensor:
        """Fixed random vectors (n, columns) that the term acts on; ``rows`` replaces their length."""
        n = self.matrix.shape[1] if rows is None else rows
        return normals((n, columns), seed).to(self.problem.device, self.problem.dtype)

    @property
    def square(self) -> bool:
        """Whether the matrix has one space on both sides."""
        term = self.term
        return (term.domain, term.domain_params) == (term.codomain, term.codomain_params)

    @property
    def unrestricted(self) -> bool:
        """Whether there are parameters on a side, and all of them."""
        on_parameters = "parameters" in (self.term.domain, self.term.codomain)
        return on_parameters and self.term.domain_params is None and self.term.codomain_params is None


@dataclass
class Subject:
    """A term that is being checked.

    Args:
        given: the term, or its name in the registry, or an expression as text.
        problems: problems to check on; None: the kit's own.
        reference: problem -> dense matrix.
    """

    given: Expr | str
    problems: Sequence[Problem] | None = None
    reference: Dense | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    """Problem -> why the term refused it."""

    @functools.cached_property
    def term(self) -> Expr:
        """The term, built if it was given by name."""
        if isinstance(self.given, Expr):
            return self.given
        if not isinstance(self.given, str):
            raise ConformanceError(
                f"check_term takes an expression or a registered name, got {type(self.given).__name__}; give an instance, "
                "MyTerm(), not the class"
            )
        return registry.build(self.given.strip()) if self._is_name(self.given) else parse(self.given)

    @staticmethod
    def _is_name(text: str) -> bool:
        return bool(re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z_]\w*", text.strip()))

    @functools.cached_property
    def spec(self) -> registry.TermSpec | None:
        """The registry's entry for the term; None where it is not registered."""
        if isinstance(self.given, str) and self._is_name(self.given):
            return registry.spec(self.given.strip())
        if not isinstance(self.term, NamedExpr):
            return None
        try:
            found = registry.spec(self.term.label)
        except RegistryError:
            return None
        # Another term may have the name of this one's class.
        return found if found.factory is type(self.term) else None

    @functools.cached_property
    def cases(self) -> list[Case]:
        """The term on every problem that it does not refuse.

        Raises:
            Failure: it refuses all.
        """
        given = self._given_problems()
        found = [case for name, problem in given.items() if self._fits(case := self._case(name, problem))]
        if not found:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            raise Failure(
                "at least one problem that the term is defined for",
                f"a refusal of all {len(given)} ({reasons})",
                "Pass problems=[...] with a loss and a model that it is made for",
            )
        return found

    def _given_problems(self) -> dict[str, Problem]:
        if self.problems is None:
            return {name: make(maker) for name, maker in PROBLEMS.items()}
        return {f"number {i}, {problem!r}": problem for i, problem in enumerate(self.problems, 1)}

    def _case(self, name: str, problem: Problem) -> Case:
        return Case(self.term, problem, name, self.reference)

    def _fits(self, case: Case) -> bool:
        try:
            _ = case.matrix
        except (LossError, ProblemError) as error:  # the matrix is not defined for this loss or model
            self.skipped[case.name] = str(error)
            return False
        except Exception:  # the check of products reports it better
            return True
        return True


def on_problems(check: Callable[[Case], None]) -> Check:
    """A check of one case, made into one of all cases; at least one must be applicable."""

    @functools.wraps(check)
    def every(subject: Subject) -> None:
        reasons: list[str] = []
        for case in subject.cases:
            try:
                check(case)
            except NotApplicable as reason:
                reasons.append(str(reason))
            except Failure as failure:
                raise AssertionError(f"on the problem {case.name!r}: {failure}") from failure
            except Exception as error:
                raise AssertionError(
                    f"on the problem {case.name!r}: expected no exception; got {type(error).__name__}: {error}"
                    f"{place(error)}"
                ) from error
        if len(reasons) == len(subject.cases):
            raise NotApplicable(reasons[0])

    return every
