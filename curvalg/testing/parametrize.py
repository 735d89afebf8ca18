"""Tests for pytest, one for each term and check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curvalg.errors import ConformanceError, CurvalgError
from curvalg.expr import Expr
from curvalg.testing.checks.table import BASIC, CHECKS, WITHOUT_NUMBERS, chosen
from curvalg.testing.conformance import checked_names, run
from curvalg.testing.outcome import NotApplicable
from curvalg.testing.subject import Subject

if TYPE_CHECKING:
    import pytest


class TermCheck:
    """One check on one term, to be called in a test; a check that does not apply skips the test.

    Args:
        name: of the check.
        subject: the term; shared by its checks, so that what they have in common is computed once.
    """

    def __init__(self, name: str, subject: Subject) -> None:
        self.name = name
        self.__name__ = name
        self._subject = subject

    def __call__(self, term: Expr | str | None = None) -> None:
        """Run this check on its term.

        Args:
            term: another term to check in place of its own.

        Raises:
            ConformanceError: it failed.
            CurvalgError: the term cannot be built.
        """
        import pytest

        own = term is None or term is self._subject.given
        subject = self._subject if own else Subject(term)  # type: ignore[arg-type]  # it is not None
        try:
            _ = subject.term
        except CurvalgError:
            if self.name == next(iter(CHECKS)):
                raise
            pytest.skip("the term cannot be built; see the first of its tests")
        if self.name not in WITHOUT_NUMBERS and self.name != BASIC and run(BASIC, subject) is not None:
            pytest.skip(f"products of the term fail; see its test {BASIC!r}")
        try:
            message = run(self.name, subject, missing_is_passing=False)
        except NotApplicable as reason:
            pytest.skip(str(reason))
        if message is not None:
            raise ConformanceError(f"{subject.given}, {self.name}: {message}", {self.name: message})

    def __repr__(self) -> str:
        return f"<check {self.name} of {self._subject.given}>"


def term_checks(term: Expr | str, *, processes: bool = False) -> Iterator[TermCheck]:
    """Every check of a term; nothing is computed or built before one is called.

    Args:
        term: as :func:`check_term` takes it.
        processes: whether two processes that share the data are among the checks.
    """
    subject = Subject(term)
    return (TermCheck(name, subject) for name in chosen(processes))


def parametrize_terms(
    terms: Sequence[Expr | str],
    *,
    expected_failures: Mapping[str, str] | Callable[[Expr | str], Mapping[str, str]] | None = None,
    processes: bool = False,
) -> pytest.MarkDecorator:
    """Make a decorator that turns a test function into one test for each term and check.

    Args:
        terms: as :func:`check_term` takes them. Names are looked up only when a test runs.
        expected_failures: check name -> why it fails on purpose, for all terms, or a function of the term that gives them.
            Such a test is an expected failure; if it passes, it is reported.
        processes: one more test for each term, of two processes that share the data; see :func:`check_term`.

    Returns:
        the decorator; the function takes ``term`` and ``check`` and calls ``check(term)``.

    Raises:
        ConformanceError: an expected failure of no check.

    >>> from curvalg.testing import CHECKS, parametrize_terms
    >>> @parametrize_terms(["ggn", "hessian"], expected_failures={"blocks": "not of interest here"})
    ... def test_conformance(term, check):
    ...     check(term)
    >>> len(test_conformance.pytestmark[0].args[1]) == 2 * len(CHECKS)
    True
    """
    import pytest

    parameters: list[Any] = []
    for term in terms:
        given = expected_failures(term) if callable(expected_failures) else expected_failures
        expected = checked_names(given)
        for check in term_checks(term, processes=processes):
            # raises: nothing but the failed check itself is expected; strict: a pass is reported.
            reason = expected.get(check.name)
            marks = (
                [pytest.mark.xfail(reason=reason, strict=True, raises=ConformanceError)] if reason is not None else []
            )
            parameters.append(pytest.param(term, check, id=f"{term}-{check.name}", marks=marks))
    return pytest.mark.parametrize(("term", "check"), parameters)
