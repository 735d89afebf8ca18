"""A weighted sum of local terms that share one input, and so one tangent and one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from curvalg.expr.facts import LossFacts
from curvalg.expr.term import DatasetTerm, Term
from curvalg.lowering.sweeps.contract import call, fitting, is_ours
from curvalg.lowering.sweeps.recordings import Rate
from curvalg.lowering.sweeps.transposed import TransposedDatasetTerm, TransposedTerm
from curvalg.problem import Batch, Problem, Samples, Snapshot

Prepared = dict[DatasetTerm, Any]
Totals = dict[DatasetTerm, Any]


@dataclass(frozen=True)
class Sweep:
    """Local terms to be computed together.

    Args:
        entries: (coefficient, term).
    """

    entries: tuple[tuple[float, Term], ...]

    @cached_property
    def key(self) -> frozenset[tuple[float, Term]]:
        """A key that is equal for equal sums, in whatever order they were written."""
        return frozenset(self.entries)

    @cached_property
    def _text(self) -> str:
        return " + ".join(sorted(f"{c:g}*{term}" for c, term in self.entries))

    def __str__(self) -> str:
        return self._text

    @property
    def curved(self) -> bool:
        """Whether a term has a u, so that second derivatives of the model are needed."""
        return any(defines(term, "cotangent") for _, term in self.entries)

    def symmetric(self, loss: LossFacts | None) -> bool:
        """Whether all terms are symmetric, as far as is known."""
        return all(term.facts(loss).symmetric is True for _, term in self.entries)

    @property
    def dataset_terms(self) -> list[DatasetTerm]:
        """Terms that need statistics of the whole data set."""
        return [term for _, term in self.entries if isinstance(term, DatasetTerm)]

    @property
    def projects(self) -> list[DatasetTerm]:
        """Terms with totals that need no pass over the data."""
        return [term for term in self.dataset_terms if defines(term, "project")]

    @property
    def reduces(self) -> list[DatasetTerm]:
        """Terms that need a pass of their own before the cotangents are known."""
        return [term for term in self.dataset_terms if defines(term, "reduce")]

    def needs_whole(self, samples: Samples, positions_per_row: int) -> str | None:
        """Why a term needs more than one position of the outputs at a time, or None.

        Args:
            samples: what a sample is.
            positions_per_row: how many positions a row of the batch has.
        """
        for _, term in self.entries:
            if term.acts_on == "batch":
                return f"{term.label} does not say that it acts on every position by itself"
            if term.acts_on == "samples" and samples == "item" and positions_per_row > 1:
                return f"{term.label} acts on rows of {positions_per_row} positions (samples='position' makes each a sample)"
        return None

    def cotangent(self, batch: Batch) -> Tensor:
        """The sum Σ cᵢ uᵢ, of the output's shape."""
        total: Tensor | None = None
        for coefficient, term in self.entries:
            u = call(term, "cotangent", batch)
            if u is not None:
                total = _accumulate(total, coefficient, fitting(term, "cotangent", u, batch.output))
        return torch.zeros_like(batch.output) if total is None or batch.weightless else total

    def rate(self, batch: Batch, tangent: Tensor, prepared: Prepared, totals: Totals) -> Tensor:
        """The sum Σ cᵢ u̇ᵢ for one tangent, of the output's shape."""
        result: Tensor | None = None
        for coefficient, term in self.entries:
            if isinstance(term, DatasetTerm):
                rate = call(term, "cotangent_dot", batch, tangent, prepared[term], totals.get(term))
            else:
                rate = call(term, "cotangent_dot", batch, tangent)
            if rate is not None:
                result = _accumulate(result, coefficient, fitting(term, "cotangent_dot", rate, tangent))
        return torch.zeros_like(tangent) if result is None or batch.weightless else result

    def rate_of(self, batch: Batch) -> Rate:
        """A function ż -> Σ cᵢ u̇ᵢ, for sweeps without data-set terms."""
        (coefficient, term), *others = self.entries
        if coefficient == 1 and not others and is_ours(term) and defines(term, "cotangent_dot"):
            return partial(term.cotangent_dot, batch)  # type: ignore[return-value]  # the usual case, where every call counts
        return lambda tangent: self.rate(batch, tangent, {}, {})


def prepare(
    terms: Sequence[DatasetTerm],
    problem: Problem,
    snapshot: Snapshot,
    batches: Callable[[], Iterable[Batch]] | None = None,
) -> Prepared:
    """Statistics of the whole data set that terms need without a tangent; one pass for all terms, kept on the problem.

    Args:
        terms: the terms.
        problem: the problem.
        snapshot: the state.
        batches: gives all batches, where something else is recorded of them on the way; None: by a pass of their own.
    """
    cache = problem.cached(snapshot)
    missing = cache.missing("prepared", (term for term in terms if defines(term, "prepare")))
    if missing:
        sums = {term: problem.sum() for term in missing}
        for batch in (e.evaluate() for e in problem.evaluations(snapshot)) if batches is None else batches():
            for term in missing:
                sums[term].add(batch.counted(call(term, "prepare", batch)))
        for term, total in problem.totalled(sums).items():
            cache.put("prepared", term, total)
    return {term: cache.found("prepared", term) for term in terms}


def defines(term: Term, method: str) -> bool:
    """Whether a term overrides an optional method of its contract."""
    inner = term.term if isinstance(term, (TransposedTerm, TransposedDatasetTerm)) else term
    base = DatasetTerm if isinstance(inner, DatasetTerm) else Term
    return getattr(type(inner), method) is not getattr(base, method)


def _accumulate(total: Tensor | None, coefficient: float, value: Tensor) -> Tensor:
    # Outputs of language models are the largest tensors there are: no buffer that can be done without.
    scaled = value if coefficient == 1 else coefficient * value
    return scaled if total is None else total + scaled
