"""The vocabulary that every library speaks here: questions in, functions to be timed out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from benchmarks.questions import TERMS
from benchmarks.workload import Workload

Run = Callable[[], Tensor]
"""What is timed; its result is compared. What was done before it existed is not in the time."""

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Difference:
    """A matrix that a library defines in another way, so that values need not agree.

    Args:
        question: where.
        models: of these models only; empty for all.
        says: how.
    """

    question: str
    says: str
    models: tuple[str, ...] = ()

    def about(self, question: str, model: str) -> bool:
        """Whether it is this one."""
        return question == self.question and (not self.models or model in self.models)


def answers(*questions: str) -> Callable[[Method], Method]:
    """Mark a method ``(workload, question) -> Run | None`` as the answer to these questions; None: not on this model."""

    def mark(method: Method) -> Method:
        method.questions = questions  # type: ignore[attr-defined]
        return method

    return mark


class Peer:
    """A library, or a way of using it. One file in this folder defines one.

    Attributes:
        name: of the contestant.
        distribution: the package whose version is reported.
        settles: products after which its times no longer change (one of K columns counts K times).
        fuses: whether a sum costs less than its terms.
        many_columns: whether it multiplies with a matrix other than column by column.
        only: the cases that it takes part in; empty for all.
        differs: what it defines in another way.
    """

    name: ClassVar[str]
    distribution: ClassVar[str]
    settles: ClassVar[int] = 2
    fuses: ClassVar[bool] = False
    many_columns: ClassVar[bool] = True
    only: ClassVar[tuple[str, ...]] = ()
    differs: ClassVar[tuple[Difference, ...]] = ()

    def prepare(self, question: str, workload: Workload) -> Run | None:
        """The answer to a question; None where the library has none.

        Args:
            question: a key of ``QUESTIONS``.
            workload: model, data and vectors.
        """
        method = self.methods().get(question)
        return None if method is None else method(self, workload, question)

    def difference(self, question: str, model: str) -> str | None:
        """How its matrix differs by definition, if it does; a sum differs where one of its terms does."""
        questions = TERMS if question == "sum" else (question,)
        found = (known.says for known in self.differs for q in questions if known.about(q, model))
        return next(found, None)

    @answers("sum")
    def sum_of_terms(self, workload: Workload, question: str) -> Run | None:
        """One product for each term, which is what a library without sums does."""
        runs = [self.prepare(term, workload) for term in TERMS]
        whole = [run for run in runs if run is not None]
        return None if len(whole) < len(TERMS) else lambda: reduce(add, (run() for run in whole))

    def settled(self, columns: int) -> int:
        """Runs with so many columns after which its times no longer change."""
        return max(2, -(-self.settles // columns))

    @classmethod
    def methods(cls) -> dict[str, Callable[..., Run | None]]:
        """The answers, by question."""
        found: dict[str, Callable[..., Run | None]] = {}
        for base in reversed(cls.__mro__):
            for method in vars(base).values():
                found |= dict.fromkeys(getattr(method, "questions", ()), method)
        return found


def looped(multiply: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    """Column by column, for libraries that take vectors only."""
    if vectors.ndim == 1:
        return multiply(vectors)
    return torch.stack([multiply(column) for column in vectors.T], 1)
