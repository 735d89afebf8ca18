"""Layers of a model whose parameters lie in parts on several processes: recorded by all of them in step.

Each model call and each backward pass brings weights together, so that all processes make the same ones in the same order,
whatever the data of each are like.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvalg.errors import ProblemError
from curvalg.problem.data.batches import ReadBatch
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.layers.capture import Capture
from curvalg.problem.layers.recorded import RecordedLayers, Watching, record_layers
from curvalg.problem.layers.uses import Use
from curvalg.problem.layers.verify import measured_noise, misplaced, settle
from curvalg.problem.model.layer_record import LayerRecord
from curvalg.problem.model.sharded.sharded_model import ShardedModel
from curvalg.problem.verification.tangent_checks import random_cotangent
from curvalg.tensors.backward import backward_columns
from curvalg.tensors.memory import wide

CURE = "choose the other parameters with params=, or make the Problem of a whole model on every process where it fits"

TRIES = 3
"""Comparisons of a parameter whose gradient vanishes beside the others, which say nothing; one process alone compares on."""


class RecordedTogether(RecordedLayers):
    """The graph of one model call, and all that its layers saw, on one of several processes that record in step.

    A backward pass is one for all columns, or as many as the process with the most columns needs. After the last one a process
    joins the others in theirs (:meth:`finish`), with columns of zeros.
    """

    @staticmethod
    def watching(evaluation: Evaluation, capture: Capture) -> Watching:
        model = evaluation.problem.model
        assert isinstance(model, ShardedModel)
        weights = model.weights

        @contextmanager
        def watch(leaves: list[Tensor]) -> Iterator[Any]:
            with capture.watch(leaves), weights.noticing(capture.stands_for):
                yield

        return watch

    # -- what records are compared with: the parts of gradients on all processes, which have the same rows then ----------------

    def gradients(self, names: Sequence[str], cotangent: Tensor) -> dict[str, Tensor]:
        parts = super().gradients(names, cotangent)
        return {name: part / self.problem.group.size for name, part in parts.items()}

    def like_gradient(self, name: str, whole: Tensor) -> Tensor:
        layout = self.problem.layout
        places = layout.places_in(name).to(whole.device)
        return whole.reshape(-1)[places].reshape(layout.shapes[name])

    def lengths(self, tensors: Sequence[Tensor]) -> list[float]:
        here = [wide(t).square().sum() for t in tensors]
        return [float(total) ** 0.5 for total in self.problem.group.vectors.sum(here)]

    # -- in step ------------------------------------------------------------------------------------------------------------

    def records(self, cotangents: Tensor, *, independent: bool = False) -> list[LayerRecord]:
        most = self._announce(len(cotangents))
        if not self.notes.batched:
            cotangents = _padded(cotangents, most)
        return super().records(cotangents, independent=independent)

    def finish(self) -> None:
        """Join the other processes in the backward passes that they still make on their batches."""
        while most := self._announce(0):
            self.build(self.z.new_zeros(1 if self.notes.batched else most, *self.z.shape))

    def _announce(self, columns: int) -> int:
        """The most columns that a process wants to take back now; 0 where none wants any more."""
        return int(self.problem.group.largest(torch.tensor([float(columns)], device="cpu")))

    def _columns_back(self, edges: list[GradientEdge], cotangents: Tensor) -> list[Tensor | None]:
        gradients, batched = backward_columns(self.z, edges, cotangents, batched=self.notes.batched is not False)
        if self.notes.batched is None and len(cotangents) > 1:
            self.notes.batched = batched
        return gradients

    # -- what could take other passes on one process than on another -----------------------------------------------------------

    @property
    def unknown(self) -> bool:
        """Whether the batch has a parameter or an operation that was not compared with gradients yet, or on one row alone."""
        if self.evaluation.sample.weightless:  # of which nothing counts
            return False
        notes, needed = self.notes, min(self.rows, 2)
        open_ = (name for name in self.used if notes.compared.get(name, 0) < needed)
        return any(notes.tried[name, needed] < TRIES for name in open_) or not self.operations <= notes.operations

    def _settle(self) -> None:
        """Nothing: records are compared by all processes at once (:func:`compare_together`)."""

    def _route(self, gradients: dict[int, Tensor], strange: Sequence[int] = ()) -> list[int]:
        uses, rows = self._uses, self.rows
        asked = [uses[i] for i in gradients if uses[i].routable and not uses[i].fits(rows)]
        if asked:
            raise self._moving(asked)
        return list(strange)

    def _misplaced(self, cotangents: Tensor, gradients: dict[int, Tensor]) -> list[int]:
        if self._steady:
            return []
        uses = self._uses
        if self.rows == 1:  # there is no other place, but others look
            self._pull(cotangents[:1])
            return []

        def arranged(found: dict[int, Tensor]) -> dict[int, Tensor]:
            return {i: uses[i].arranged(g) for i, g in found.items()}

        strange = misplaced(self, cotangents, arranged(gradients), lambda s: arranged(self._pull(s)))
        if strange:
            raise self._moving([uses[i] for i in strange])
        return []

    def _moving(self, uses: Sequence[Use]) -> ProblemError:
        names = sorted({name for use in uses for name in use.names})
        return ProblemError(
            f"the layers of {', '.join(names)} do not see the rows of the batch in their order, which is not offered where "
            f"parameters are sharded: {CURE}"
        )

    def _explicit(self, cotangents: Tensor) -> list[LayerRecord]:
        reasons: Mapping[str, str] = self.notes.reasons
        if named := [f"{name}, because {reasons[name]}" for name in self.problem.layout.names if name in reasons]:
            raise ProblemError(
                f"there are no layer inputs and deltas of {'; '.join(named)}. Gradients of single rows, which would stand in "
                f"for them, are not offered where parameters are sharded: {CURE}"
            )
        return []


def record_together(evaluation: Evaluation, *, compared: bool = True) -> RecordedTogether:
    """Call the model once, together with all processes, and keep what gives layer inputs and output deltas.

    Args:
        evaluation: a batch at a snapshot.
        compared: whether layers must have been compared with gradients (:func:`compare_together`).
    """
    return cast("RecordedTogether", record_layers(evaluation, compared=compared, kind=RecordedTogether))


def _padded(cotangents: Tensor, columns: int) -> Tensor:
    """Columns (K, ...) and zeros after them."""
    if len(cotangents) == columns:
        return cotangents
    return torch.cat([cotangents, cotangents.new_zeros(columns - len(cotangents), *cotangents.shape[1:])])


def compare_together(recorded: RecordedTogether) -> None:
    """Compare the layers with gradients where the batch of some process is computed in a new way.

    All do it on that batch, which its process sends to the others, so that they come to one verdict by the same passes; on the
    largest first, after which those of the others are rarely new.

    Raises:
        ProblemError: a parameter's gradients are wrong on every route.
    """
    evaluation, looked = recorded.evaluation, False
    group, sample = evaluation.problem.group, evaluation.sample
    while any(rows := [n for (n,) in group.numbers(0.0 if looked or not recorded.unknown else float(sample.rows))]):
        source = rows.index(max(rows))
        looked = looked or source == group.rank
        sent: ReadBatch = group.of(source, replace(sample, start=0, index=-1) if source == group.rank else None)
        common = record_together(evaluation.of(sent), compared=False)
        u = random_cotangent(common.z.detach())
        common.notes.noise = measured_noise(common, u, common.gradients(list(common.leaves), u))
        settle(common)
        common.notes.tried.update((name, min(common.rows, 2)) for name in common.used)
