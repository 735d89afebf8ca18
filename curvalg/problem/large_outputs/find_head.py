"""Finding the last linear layer of a model, so that outputs of vocabulary size need not be made.

A batch is taken this way where its outputs would be larger than ``Problem(output_memory=...)``, its loss is one of softmax
probabilities, and the model returns the outputs of a linear layer with nothing but movements in between. The first such batch
of a problem is tried without derivatives; what it shows about the model is remembered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from curvalg.expr.term import Term
from curvalg.losses.closed_forms.softmax import SoftmaxLoss
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.large_outputs.deferred import Deferred, Deferring
from curvalg.problem.large_outputs.head import Head, why_not_a_head
from curvalg.tensors import trees


class HeadNotes:
    """Notes on whether the end of a model is a linear layer.

    Attributes:
        found: whether it is a linear layer; None before a call has shown it.
        declined: why outputs are not made in chunks.
        inner: weights of layers known not to be the last.
    """

    def __init__(self) -> None:
        self.found: bool | None = None
        self.declined: str | None = None
        self.inner: set[str] = set()


def has_large_outputs(evaluation: Evaluation) -> bool:
    """Whether the outputs of the batch may be larger than is held at a time, as far as is known without a model call."""
    problem, target = evaluation.problem, evaluation.sample.target
    if not isinstance(problem.loss, SoftmaxLoss) or not isinstance(target, Tensor):
        return False
    classes = 1 if target.is_floating_point() else problem.most_classes
    return target.numel() * classes * max(4, problem.dtype.itemsize) > problem.output_memory


def is_made_in_chunks(evaluation: Evaluation, term: Term) -> bool:
    """Whether a product with the term needs no whole output of the batch."""
    sample = evaluation.sample
    if term.acts_on == "batch" or not has_large_outputs(evaluation) or not _tried(evaluation):
        return False
    several = isinstance(sample.target, Tensor) and sample.target.ndim > 1 and not sample.target.is_floating_point()
    return term.acts_on == "positions" or evaluation.problem.samples == "position" or not several


def record_head(evaluation: Evaluation, *, graph: bool = True, once: bool = False) -> tuple[Head, list[Tensor]] | None:
    """The last layer, its input with a graph from the leaves, by one model call; None where outputs are to be made.

    :class:`HeadNotes` then says why, unless they are small.

    Args:
        evaluation: the batch.
        graph: whether there is to be a graph at all.
        once: whether one backward through it is all that follows.
    """
    if not has_large_outputs(evaluation) or not _tried(evaluation):
        return None
    leaves = [p.requires_grad_(graph) for p in evaluation.values()]
    try:
        with torch.set_grad_enabled(graph):
            found = _call(evaluation, leaves, once=once)
    except Exception:  # whatever is wrong with the model on these data, the ordinary call reports it better
        return None
    if isinstance(found, str):
        return None
    return found, leaves


def push_hidden(evaluation: Evaluation, vector: Tensor, names: Collection[str]) -> Tensor:
    """ḣ = J v of the input h of the last layer, of its shape; one model call by forward AD, without the layer.

    Args:
        evaluation: the batch.
        vector: v (D,).
        names: parameters that h depends on. A dual tensor copies its tangent, and the last layer's is the largest.

    Raises:
        NotImplementedError: an operation of the model has no forward AD.
        RuntimeError: likewise.
    """
    tangents = evaluation.problem.layout.tangents(vector)
    with forward_ad.dual_level():
        given = zip(evaluation.problem.layout.names, evaluation.values(), tangents, strict=True)
        duals = [forward_ad.make_dual(p, t) if name in names else p for name, p, t in given]
        found = _call(evaluation, duals)
        if isinstance(found, str):
            raise RuntimeError(found)
        h, tangent = forward_ad.unpack_dual(found.hidden)
        none = tangent is None or tangent._is_zerotensor()
        result: Tensor = torch.zeros_like(h) if none else tangent.detach()
        return result


def _tried(evaluation: Evaluation) -> bool:
    """Whether the model ends in a linear layer, found by calling it on the first batch that asks."""
    notes = evaluation.problem.noted(HeadNotes)
    if notes.found is None:
        notes.found = False
        try:
            with torch.no_grad():
                first = found = _call(evaluation, evaluation.values())
                # The outputs of inner layers may be as large; now that it is known which these are, they are left alone.
                if isinstance(first, str) and notes.inner:
                    found = _call(evaluation, evaluation.values())
        except Exception as error:
            notes.declined = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            return False
        notes.found = isinstance(found, Head)
        notes.declined = None if isinstance(first, Head) or notes.found else first
    return notes.found


def _call(evaluation: Evaluation, tensors: Sequence[Tensor], *, once: bool = False) -> Head | str:
    """The last layer with these tensors for the chosen parameters, or why there is none."""
    problem, state = evaluation.problem, evaluation.snapshot.state
    notes = problem.noted(HeadNotes)
    weights = {id(t): name for name, t in state.items()}
    weights |= {id(t): name for t, name in zip(tensors, problem.layout.names, strict=True)}
    deferring = Deferring(weights, problem.output_memory, notes.inner)
    with deferring, evaluation.guarding_inputs(evaluation.sample.batch) as batch:
        raw = evaluation.call(tensors, batch, once=once)
    notes.inner |= deferring.used.keys()
    if deferring.used:
        layer, function = list(deferring.used.items())[-1]
        return f"the outputs of the layer {layer!r} go into {function}"
    if not isinstance(raw, Deferred):
        return "the model does not return the outputs of a linear layer as one tensor"
    return why_not_a_head(raw, evaluation) or Head(raw, evaluation)


def factor_columns(evaluations: Iterator[Evaluation], term: Term, most_classes: int) -> int:
    """The columns on the first batch of this process; -1 where there is none.

    Args:
        evaluations: a pass over the data, of which one batch is taken.
        term: with a factor.
        most_classes: of an output, where outputs are made in chunks and there is no factor of a batch.
    """
    if (first := next(evaluations, None)) is None:
        return -1
    if not is_made_in_chunks(first, term):
        return term.factor_columns(first.evaluate())
    outputs = most_classes * sum(t.numel() for t in trees.tensors(first.sample.target))
    return outputs // first.sample.rows
