"""A batch whose outputs are not made as a whole: the trunk recorded up to the last linear layer, the layer taken in chunks.

With h the input of that layer and (u, u̇) of the sweep, the layer gives Γ = Wᵀu and, for a tangent ḣ = J_h v, the rate Γ̇ of
Γ along v besides its own share of the product (:mod:`curvalg.problem.large_outputs.head`). What is left is a product of the
trunk, whose outputs are h: (∂_v J_h)ᵀ Γ + J_hᵀ Γ̇.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvalg.errors import ProblemError
from curvalg.lowering.sweeps.recordings import RecordedBatch, TwoStage
from curvalg.lowering.sweeps.sweep import Sweep
from curvalg.lowering.sweeps.tangents import ForwardAD
from curvalg.problem import Evaluation, Head, has_large_outputs, push_hidden, record_head
from curvalg.problem.large_outputs.find_head import HeadNotes
from curvalg.problem.verification.tangent_checks import TangentNotes
from curvalg.tensors.columns import chunked, grad_columns


class ChunkedRecording(RecordedBatch):
    """h with its graph and, where a term is curved, G = J_hᵀΓ with a graph from Γ.

    Args:
        evaluation: the batch.
        sweep: terms that act on every position by itself.
        head: the last layer of the model on the batch.
        leaves: the tensors that h depends on.
        keep: whether graphs survive a product.
        once: whether it is for a single column of a sweep without curved terms. Forward AD needs much memory of its own: no
            graph is held meanwhile, and another call makes it again.
    """

    def __init__(
        self, evaluation: Evaluation, sweep: Sweep, head: Head, leaves: list[Tensor], keep: bool, once: bool
    ) -> None:
        super().__init__(evaluation, keep)
        self.sweep, self.head, self.leaves = sweep, head, leaves
        self.again = evaluation.again()
        self.trunk = head.hidden.requires_grad
        reached = _leaves_of(head.hidden)
        self.names = {name for name, leaf in zip(self.layout.names, leaves, strict=True) if id(leaf) in reached}
        self.gamma: Tensor | None = None
        # Edges in place of G, whose numbers nobody needs: it is as large as a vector (D,).
        self.edges: list[GradientEdge | None] = []
        if self.trunk and sweep.curved:
            self._differentiate(evaluation, head.pull(sweep.cotangent))
        elif once:
            head.hidden, self.leaves = head.hidden.detach(), []

    def _record_again(self, *, once: bool) -> None:
        """The graph of h, where it was given up; ``once`` if one backward is all that follows."""
        if self.leaves:
            return
        found = record_head(self.again(), once=once)
        if found is None:
            raise ProblemError("the model returned the outputs of a linear layer in one call and not in the next")
        head, self.leaves = found
        self.head.hidden = head.hidden

    def _differentiate(self, evaluation: Evaluation, gamma: Tensor) -> None:
        self.gamma = gamma.requires_grad_()
        gradients = evaluation.differentiate(self.head.hidden, self.leaves, self.gamma)
        self.edges = [get_gradient_edge(g) if g is not None and g.requires_grad else None for g in gradients]

    @property
    def route(self) -> str:
        """The route by which tangents of the trunk are taken."""
        return ForwardAD.ROUTE if self.gamma is None else TwoStage.ROUTE

    def graphs(self) -> Iterable[Tensor | GradientEdge]:
        return [self.head.hidden, *(edge for edge in self.edges if edge is not None)]

    def multiply(self, rows: Tensor, chunk: int) -> Tensor:
        """The product with vectors (K, D), shape (K, D): all parts are added in place, as each is large itself."""
        sweep, total = self.sweep, torch.zeros_like(rows)
        tangents = self._tangents(rows, chunk) if self.trunk else None
        cotangent = sweep.cotangent if sweep.curved else None
        rates = self.head.product(rows, tangents, cotangent, sweep.rate_of, total)
        del tangents
        if self.trunk:
            self._record_again(once=True)
            self._add_trunk(total, rows, rates, chunk)
        return total

    def _tangents(self, rows: Tensor, chunk: int) -> Tensor:
        """The tangents ḣ for vectors (K, D), shape (K, *h.shape): from G where there is one, else by forward AD."""
        evaluation = self.again()
        notes = evaluation.problem.noted(TangentNotes)
        if self.gamma is None and notes.no_forward_ad is None:
            try:
                return torch.stack([push_hidden(evaluation, row, self.names) for row in rows])
            except (NotImplementedError, RuntimeError) as error:
                notes.no_forward_ad = str(error).strip().splitlines()[0]
        if self.gamma is None:
            self._record_again(once=False)
            self._differentiate(evaluation, torch.zeros_like(self.head.hidden))
        gamma = self.gamma
        assert gamma is not None

        def push(part: Tensor) -> Tensor:
            (t,) = grad_columns(self.edges, [gamma], self.directions(part), retain=True)
            return gamma.new_zeros(part.shape[0], *gamma.shape) if t is None else t

        return chunked(push, chunk, rows)

    def _add_trunk(self, total: Tensor, rows: Tensor, rates: Tensor, chunk: int) -> None:
        retain, curved = self.keep or rows.shape[0] > chunk, self.sweep.curved
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            outputs: list[Tensor | GradientEdge | None] = [self.head.hidden]
            cotangents = [rates[part]]
            if curved:
                outputs, cotangents = [*self.edges, *outputs], [*self.directions(rows[part]), *cotangents]
            self.layout.add_(total[part], grad_columns(outputs, self.leaves, cotangents, retain=retain))


def _leaves_of(t: Tensor) -> set[int]:
    """Ids of the tensors that the graph of a tensor ends in."""
    todo, seen, found = [t.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo.extend(parent for parent, _ in node.next_functions)
    return found


def record_headed(
    evaluation: Evaluation, sweep: Sweep, keep: bool, columns: int, notes: dict[str, str]
) -> ChunkedRecording | None:
    """The batch recorded up to its last layer, or None where outputs are small or must be there as a whole.

    Args:
        evaluation: the batch.
        sweep: the terms.
        keep: whether the recording is to be kept.
        columns: of the product it is for.
        notes: where to say what was done about large outputs, under "outputs".
    """
    if not has_large_outputs(evaluation):
        return None
    head, once = None, not keep and not sweep.curved and columns == 1
    if (reason := sweep.needs_whole(evaluation.problem.samples, 1)) is None:
        found = record_head(evaluation, once=once)
        if found is None:
            reason = evaluation.problem.noted(HeadNotes).declined
        else:
            head, leaves = found
            reason = sweep.needs_whole(evaluation.problem.samples, head.positions_per_row)
    if head is None or reason is not None:
        if reason is not None:
            notes["outputs"] = f"outputs of a batch as a whole: {reason}"
        return None
    how = f"chunks of {head.chunk} position{'s' if head.chunk > 1 else ''}"
    notes["outputs"] = f"outputs of {head.classes} classes in {how} through the last linear layer ({head.name})"
    return ChunkedRecording(evaluation, sweep, head, leaves, keep, once)
