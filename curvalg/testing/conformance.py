"""Running the checks on one term, and reporting all that failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from curvalg.errors import ConformanceError
from curvalg.expr import Expr
from curvalg.problem import Problem
from curvalg.registry.spec import did_you_mean
from curvalg.testing.checks.table import BASIC, WITHOUT_NUMBERS, chosen
from curvalg.testing.outcome import NotApplicable
from curvalg.testing.subject import Subject


def check_term(
    term: Expr | str,
    *,
    problems: Sequence[Problem] | None = None,
    dense: Callable[[Problem], Tensor] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    processes: bool = False,
) -> None:
    """Check that a term keeps the contract of terms; one line in the test suite of a plugin.

    All checks of :data:`curvalg.testing.CHECKS` run, each on every problem; what does not apply to this kind of term is
    left out.

    Args:
        term: an instance of a Term, DatasetTerm, MatrixTerm or GradientTerm, any other expression, the name of a registered
            term, or an expression as text. Registered terms are also checked for their description and for reading back as
            they print.
        problems: problems to check on, small ones (dense matrices are made); None: the kit's own, which differ in dtype,
            loss, output shape and batches. Problems that the term refuses with LossError or ProblemError are left out.
        dense: ``dense(problem) -> matrix`` of the operator's shape, a reference to compare with.
        expected_failures: check name -> why it fails on purpose. Such a check must fail.
        processes: also run the check "processes": two processes that share the data, in uneven parts or with none on one of
            them, give the matrix of one. They are started at the first such check, which takes about five seconds, and end with
            the program. The term is pickled for them; one that cannot be pickled, or imported there, is left out.

    Raises:
        RegistryError: the name is not registered, or its plugin cannot be imported.
        ConformanceError: some check failed, or did not fail although expected to; with all messages in ``failures``.

    >>> from dataclasses import dataclass
    >>> from curvalg import Facts, Term
    >>> @dataclass(frozen=True)
    ... class Squared(Term):
    ...     def cotangent_dot(self, batch, tangent):
    ...         return tangent**2
    >>> from curvalg.testing import check_term
    >>> try:
    ...     check_term(Squared())
    ... except AssertionError as error:
    ...     print("linearity" in error.failures)
    True
    """
    expected = checked_names(expected_failures)
    if problems is not None and (isinstance(problems, Problem) or not problems):
        given = "a Problem" if isinstance(problems, Problem) else "none"
        raise ConformanceError(
            f"expected problems=[problem, ...], got {given}; put problems into a list, or leave it out"
        )
    subject = Subject(term, problems, dense)
    _ = subject.term  # an unknown name is no failure of a check
    failures: dict[str, str] = {}
    checks = chosen(processes)
    for name in checks:
        if name not in WITHOUT_NUMBERS and name != BASIC and BASIC in failures:
            continue
        message = run(name, subject)
        if message is not None and name not in expected:
            failures[name] = message
        elif message is None and name in expected:
            failures[name] = (
                f"expected to fail ({expected[name]}), but it passed or does not apply. Remove it from expected_failures"
            )
    if failures:
        raise ConformanceError(_report(subject, failures, len(checks)), failures)


def checked_names(expected_failures: Mapping[str, str] | None) -> Mapping[str, str]:
    """The expected failures, if all of them name checks.

    Raises:
        ConformanceError: a name that no check has.
    """
    expected = dict(expected_failures or {})
    for name in expected:
        if name not in (known := chosen(processes=True)):
            raise ConformanceError(
                f"expected_failures: no check is called {name!r}{did_you_mean(name, known)}; the checks are {', '.join(known)}"
            )
    return expected


def run(name: str, subject: Subject, *, missing_is_passing: bool = True) -> str | None:
    """Run one check: None where it passes, else the message.

    Args:
        name: of the check.
        subject: the term.
        missing_is_passing: whether a check that does not apply counts as passed.

    Raises:
        NotApplicable: it does not apply, unless that counts as passed.
    """
    try:
        chosen(processes=True)[name](subject)
    except NotApplicable:
        if not missing_is_passing:
            raise
    except AssertionError as failure:
        return str(failure)
    except Exception as error:  # a term that cannot even be built or compared
        return f"expected no exception; got {type(error).__name__}: {error}"
    return None


def _report(subject: Subject, failures: Mapping[str, str], count: int) -> str:
    lines = [f"{subject.given} fails {len(failures)} of {count} checks"]
    for name, message in failures.items():
        what = (chosen(processes=True)[name].__doc__ or "").strip().splitlines()[0]
        lines += [f"{name}: {what}", f"    {message}"]
    if BASIC in failures:
        lines.append(f"Checks of numbers were left out, since {BASIC!r} failed.")
    lines += [f"Left out, the problem {name!r}: {reason}" for name, reason in subject.skipped.items()]
    return "\n".join(lines)
