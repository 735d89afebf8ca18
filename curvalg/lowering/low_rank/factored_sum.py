"""The test whether an expression is a sum Σ c V Vᵀ + shift · I of terms with known columns V."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from curvalg.expr import Expr
from curvalg.expr.affine_form import affine
from curvalg.expr.term import DatasetTerm, Term
from curvalg.problem import Problem


@dataclass(frozen=True)
class FactoredSum:
    """A sum Σ c V Vᵀ + shift · I, some of the terms centred.

    Args:
        entries: (c, term), in one order whatever the order of the sum.
        shift: multiple of the identity.
    """

    entries: tuple[tuple[float, Term], ...]
    shift: float

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of the sum."""
        return tuple(term for _, term in self.entries)


def factored_sum(expr: Expr, problem: Problem) -> FactoredSum | str:
    """The expression as such a sum, or why it is none on this problem; coefficients may have any sign."""
    parts, shift = affine(expr)
    entries = [(c, part) for c, part in parts if isinstance(part, Term)]
    if not parts or len(entries) < len(parts):
        return "the matrix is not a sum of terms with few output directions and the identity"
    return why_not_factored(entries, problem) or FactoredSum(tuple(in_order(entries)), shift)


def why_not_factored(entries: Sequence[tuple[float, Term]], problem: Problem) -> str | None:
    """Why a sum of terms is none of matrices V Vᵀ with known V, or None."""
    for _, term in entries:
        if type(term).factor is Term.factor:
            return f"{term} is not of the form V Vᵀ with known V"
        if not term.facts(problem.facts).psd:
            return f"{term} is not known to be positive semi-definite"
        if isinstance(term, DatasetTerm) and not term.centred:
            return f"{term} needs totals of the data set"
    if problem.totals.misaligned is not None:
        return "rows of its outputs are not its samples"
    if problem.model.batch_statistics:
        return "samples influence each other through batch statistics"
    return None


def in_order(entries: Sequence[tuple[float, Term]]) -> list[tuple[float, Term]]:
    """The terms in one fixed order, so that sums written in any order share what is kept."""
    return sorted(entries, key=lambda entry: repr(entry[1]))
