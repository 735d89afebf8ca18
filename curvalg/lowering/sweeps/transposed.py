"""Transposes of local terms: (∂_v J)ᵀu is symmetric already, so only the map ż -> u̇ is transposed, by autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor

from curvalg.errors import ExpressionError
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.term import DatasetTerm, Term
from curvalg.tensors.trees import NAMESPACE

if TYPE_CHECKING:
    from curvalg.problem import Batch


@dataclass(frozen=True)
class TransposedTerm(Term):
    """The transpose of a one-pass term."""

    term: Term

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return self.term.facts(loss)

    def cotangent(self, batch: Batch) -> Tensor | None:
        return self.term.cotangent(batch)

    def cotangent_dot(self, batch: Batch, tangent: Tensor) -> Tensor | None:
        def forward(t: Tensor) -> Tensor:
            rate = self.term.cotangent_dot(batch, t)
            return torch.zeros_like(t) if rate is None else rate

        return torch.func.vjp(forward, torch.zeros_like(tangent))[1](tangent)[0]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TransposedDatasetTerm(DatasetTerm):
    """The transpose of a term with data-set totals: u̇ = D(ż, R(ż)) becomes Dₜᵀ s + Rᵀ Σ D_Rᵀ s."""

    term: DatasetTerm

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return self.term.facts(loss)

    def cotangent(self, batch: Batch) -> Tensor | None:
        return self.term.cotangent(batch)

    def prepare(self, batch: Batch) -> Any:
        return self.term.prepare(batch)

    def reduce(self, batch: Batch, tangent: Tensor, prepared: Any) -> Any:
        return self._pull(batch, tangent, prepared)[1]

    def cotangent_dot(self, batch: Batch, tangent: Tensor, prepared: Any, totals: Any) -> Tensor:  # type: ignore[override]
        direct = self._pull(batch, tangent, prepared)[0]
        pull = torch.func.vjp(lambda t: self.term.reduce(batch, t, prepared), torch.zeros_like(tangent))[1]
        return direct + pull(totals)[0]  # type: ignore[no-any-return]

    def _pull(self, batch: Batch, cotangent: Tensor, prepared: Any) -> tuple[Tensor, Any]:
        """Cotangents of ż and of the totals for a cotangent of u̇ (both maps are linear, so any point serves)."""
        zero = torch.zeros_like(cotangent)
        reduced: Any = self.term.reduce(batch, zero, prepared)
        totals = optree.tree_map(torch.zeros_like, reduced, namespace=NAMESPACE)

        def forward(t: Tensor, totals: Any) -> Tensor:
            rate = self.term.cotangent_dot(batch, t, prepared, totals)
            return torch.zeros_like(t) if rate is None else rate

        return torch.func.vjp(forward, zero, totals)[1](cotangent)  # type: ignore[no-any-return]


def transposed(term: Term) -> Term:
    """A term whose matrix is the transpose.

    Raises:
        ExpressionError: the term projects the vector itself, which cannot be transposed from its methods.
    """
    if not isinstance(term, DatasetTerm):
        return TransposedTerm(term)
    if type(term).project is not DatasetTerm.project:
        raise ExpressionError(
            f"cannot transpose {term.label}: it defines project(). If the matrix is symmetric, let its facts() say so "
            "(Facts(symmetric=True))"
        )
    if type(term).reduce is DatasetTerm.reduce:
        raise ExpressionError(f"{term.label} is a DatasetTerm without project() and reduce(); derive it from Term")
    return TransposedDatasetTerm(term)
