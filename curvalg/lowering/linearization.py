"""Products of local terms with one vector: the pair (u, u̇) turned into passes over the data.

One pass records, per batch, z = f(θ), u (whose backward is the sum of all u̇) and G = J(θ)ᵀu; one backward of G along v
is then the whole fused product (∂_v J)ᵀu + Jᵀu̇. Where no term has a u, forward AD gives ż = J v and one backward Jᵀu̇.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvalg.errors import ExpressionError, ProblemError
from curvalg.expr.term import DatasetTerm, Term
from curvalg.lowering.transposed import TransposedDatasetTerm, TransposedTerm
from curvalg.problem import Batch, Evaluation, Problem, Snapshot, trees
from curvalg.problem.evaluation import backward

Rate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sweep:
    """A weighted sum of local terms that share one input, and so one tangent and one pass.

    Args:
        entries: (coefficient, term).
    """

    entries: tuple[tuple[float, Term], ...]

    @property
    def records(self) -> bool:
        """Whether a term has a u, so that second derivatives of the model are needed."""
        return any(_defines(term, "cotangent") for _, term in self.entries)

    @property
    def dataset_terms(self) -> list[DatasetTerm]:
        """Terms that need statistics of the whole data set."""
        return [term for _, term in self.entries if isinstance(term, DatasetTerm)]

    @property
    def reduces(self) -> list[DatasetTerm]:
        """Terms that need a pass of their own before the cotangents are known."""
        return [term for term in self.dataset_terms if _defines(term, "reduce")]

    def apply(self, problem: Problem, snapshot: Snapshot, vector: Tensor) -> Tensor:
        """The product with one vector (D,), batch by batch, nothing kept but what the terms prepared."""
        prepared = prepare(self.dataset_terms, problem, snapshot)
        totals = {
            term: term.project(vector, prepared[term]) for term in self.dataset_terms if _defines(term, "project")
        }
        tangents = self._reduce(problem, snapshot, vector, prepared, totals) if self.reduces else {}
        result = torch.zeros_like(vector)
        for evaluation in problem.evaluations(snapshot, order_matters=bool(tangents)):
            tangent = tangents.pop(evaluation.sample.index, None)
            result += self._product(evaluation, vector, tangent, prepared, totals)
        return result

    def _reduce(
        self,
        problem: Problem,
        snapshot: Snapshot,
        vector: Tensor,
        prepared: dict[DatasetTerm, Any],
        totals: dict[DatasetTerm, Any],
    ) -> dict[int, Tensor]:
        """The pass of terms with ``reduce``: adds to the totals, gives the tangents of all batches."""
        tangents = {}
        for evaluation in problem.evaluations(snapshot):
            batch, tangents[evaluation.sample.index] = evaluation.push(vector)
            for term in self.reduces:
                stats = term.reduce(batch, tangents[evaluation.sample.index], prepared[term])
                totals[term] = trees.add(totals.get(term), stats)
        return tangents

    def _product(
        self,
        evaluation: Evaluation,
        vector: Tensor,
        tangent: Tensor | None,
        prepared: dict[DatasetTerm, Any],
        totals: dict[DatasetTerm, Any],
    ) -> Tensor:
        if not self.records:
            if tangent is None:
                batch, tangent = evaluation.push(vector)
            else:
                batch = evaluation.evaluate()
            rates = self.rate(batch, prepared, totals)(tangent)
            del batch, tangent  # released before the next model call, which is the peak
            return evaluation.pull(rates)
        directions = evaluation.problem.layout.tangents(vector)
        z, leaves, form = evaluation.record()
        batch = evaluation.batch(z, form)
        rate = self.rate(batch, prepared, totals)
        if not self.dataset_terms:
            u = Cotangent.apply(z, self.cotangent(batch), rate)
            gradients = backward([z], leaves, [u], create_graph=True)
            return evaluation.gather(backward(gradients, leaves, directions))
        # Totals of the data set must not enter the Function (under vmap one column would meet all): two stages, with u
        # a leaf and u̇ made outside the graph.
        u = self.cotangent(batch).detach().requires_grad_()
        gradients = backward([z], leaves, [u], create_graph=True)
        if tangent is None:
            (tangent,) = backward(gradients, [u], directions, retain_graph=True)
        rates = rate(torch.zeros_like(z) if tangent is None else tangent.detach())
        return evaluation.gather(backward([*gradients, z], leaves, [*directions, rates]))

    def cotangent(self, batch: Batch) -> Tensor:
        """Σ cᵢ uᵢ, of the output's shape."""
        total: Tensor | None = None
        for coefficient, term in self.entries:
            u = term.cotangent(batch)
            if u is not None:
                total = _accumulate(total, coefficient, _checked(term, "cotangent", u, batch.output))
        return torch.zeros_like(batch.output) if total is None else total

    def rate(self, batch: Batch, prepared: dict[DatasetTerm, Any], totals: dict[DatasetTerm, Any]) -> Rate:
        """ż -> Σ cᵢ u̇ᵢ, of the output's shape."""

        def total(tangent: Tensor) -> Tensor:
            result: Tensor | None = None
            for coefficient, term in self.entries:
                if isinstance(term, DatasetTerm):
                    rate = term.cotangent_dot(batch, tangent, prepared[term], totals.get(term))
                else:
                    rate = term.cotangent_dot(batch, tangent)
                if rate is not None:
                    result = _accumulate(result, coefficient, _checked(term, "cotangent_dot", rate, tangent))
            return torch.zeros_like(tangent) if result is None else result

        return total


class Cotangent(torch.autograd.Function):
    """u on the way forward; on the way back the arriving ż = J v becomes u̇ and goes on to z.

    The context holds a function over detached data only, never what owns the graph: a cycle through the autograd engine
    is not collected.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, u: Tensor, rate: Rate) -> Tensor:  # type: ignore[override]
        return u.view_as(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rate = inputs[2]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.rate(tangent), None, None


def prepare(terms: Sequence[DatasetTerm], problem: Problem, snapshot: Snapshot) -> dict[DatasetTerm, Any]:
    """What the terms need of the whole data set without a tangent; one pass for all of them, kept on the problem."""
    kept = problem.kept(snapshot)
    missing = [t for t in dict.fromkeys(terms) if ("prepared", t) not in kept and _defines(t, "prepare")]
    if missing:
        sums: dict[DatasetTerm, Any] = dict.fromkeys(missing)
        for evaluation in problem.evaluations(snapshot):
            batch = evaluation.evaluate()
            for term in missing:
                sums[term] = trees.add(sums[term], term.prepare(batch))
        kept.update({("prepared", term): stats for term, stats in sums.items()})
    return {term: kept.get(("prepared", term)) for term in terms}


def _accumulate(total: Tensor | None, coefficient: float, value: Tensor) -> Tensor:
    # Outputs of language models are the largest tensors there are: no buffer that can be done without.
    scaled = value if coefficient == 1 else coefficient * value
    return scaled if total is None else total + scaled


def _defines(term: Term, method: str) -> bool:
    """Whether a term overrides an optional method of its contract."""
    inner = term.term if isinstance(term, (TransposedTerm, TransposedDatasetTerm)) else term
    base = DatasetTerm if isinstance(inner, DatasetTerm) else Term
    return getattr(type(inner), method) is not getattr(base, method)


def _checked(term: Term, method: str, value: Tensor, like: Tensor) -> Tensor:
    # autograd broadcasts a wrong-shaped cotangent without a word.
    if not isinstance(value, Tensor) or value.shape != like.shape:
        raise ExpressionError(
            f"{term.label}.{method} must return a tensor of the output's shape {tuple(like.shape)} or None, got "
            f"{trees.describe(value)}"
        )
    return value


def require_finite(result: Tensor, what: str) -> Tensor:
    """Raises:
    ProblemError: a product with NaN or infinite entries.
    """
    if not bool(torch.isfinite(result.sum())) and not bool(torch.isfinite(result).all()):
        raise ProblemError(
            f"the product with {what} has NaN or infinite entries; the loss or a second derivative is not finite there "
            "(half precision overflows in double backward: use float32 or bfloat16)"
        )
    return result
