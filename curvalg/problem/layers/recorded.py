"""A recorded model call that gives layer inputs and output deltas for several chunks of columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from weakref import ref

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.layers.build import build, common_form
from curvalg.problem.layers.capture import Capture
from curvalg.problem.layers.joint import Joint, Zero
from curvalg.problem.layers.kinds.maps import LinearMap
from curvalg.problem.layers.kinds.scaling import Explicit
from curvalg.problem.layers.notes import LayerNotes
from curvalg.problem.layers.per_sample import refuse_batch_statistics, row_gradients
from curvalg.problem.layers.routing import is_steady
from curvalg.problem.layers.uses import Declined, DenseUse, Routing
from curvalg.problem.layers.verify import MISPLACED, misplaced, owners, settle
from curvalg.problem.model.layer_record import GuardedInput, LayerRecord, ParameterGroup
from curvalg.problem.model.model import ModuleModel
from curvalg.problem.model.outputs import OutputForm
from curvalg.problem.verification.tangent_checks import random_cotangent
from curvalg.tensors.backward import backward_columns


class RecordedLayers:
    """The graph of one model call, and all that its layers saw.

    Args:
        evaluation: of the batch.
        z: the output, with its graph.
        leaves: the tensors that stand for the parameters.
        form: how z came from what the model returned.
        capture: what happened to the leaves.
    """

    def __init__(
        self, evaluation: Evaluation, z: Tensor, leaves: list[Tensor], form: OutputForm, capture: Capture
    ) -> None:
        # The batch holds no recording that holds the batch: graphs are freed when they are done with.
        alive = ref(self)
        self.batch = evaluation.batch(z, form, layers=lambda: alive() or record_layers(again()))
        again = evaluation.again()
        self.evaluation = evaluation
        self.problem = evaluation.problem
        self.dtype, self.notes = self.problem.dtype, self.problem.noted(LayerNotes)
        self.z = z
        self.leaves = dict(zip(self.problem.layout.names, leaves, strict=True))
        self._uses = capture.uses
        self._inputs: dict[tuple[int, ...], GuardedInput | LinearMap] = {}
        self._settled = False
        for name, reason in capture.reasons.items():
            self.notes.reasons.setdefault(name, reason)

    @property
    def used(self) -> set[str]:
        """The parameters that some function of the table takes."""
        return {name for use in self._uses for name in use.roles.values()}

    def dtypes(self, name: str) -> set[torch.dtype]:
        """The dtypes of the outputs of all functions that take a parameter."""
        return {use.output_dtype for use in self._uses if name in use.roles.values()}

    def head(self, rows: int) -> RecordedLayers | None:
        """The recording of the first rows alone; None where they are not a small part, or cannot be computed alone.

        Computed alone they must use the parameters in the same way, with the same result.
        """
        sample = self.evaluation.sample
        if sample.rows < 2 * rows or self.problem.draws.mode == "frozen":
            return None
        evaluation = self.evaluation.of(sample.head(rows))
        reasons = dict(self.notes.reasons)
        try:
            few = record_layers(evaluation)
        except ProblemError:
            return None
        finally:
            self.notes.reasons = reasons
        expected = self.z[:rows].detach()
        if few.z.shape != expected.shape or [u.signature for u in few._uses] != [u.signature for u in self._uses]:
            return None
        # Kernels round differently on other sizes; a wrong slice is wrong by far more.
        scale = expected.abs().max() + torch.finfo(expected.dtype).tiny
        close = bool(((few.z.detach() - expected).abs().max() / scale) < 1e-2)
        return few if close else None

    def records(self, cotangents: Tensor) -> list[LayerRecord]:
        """Records that cover every chosen parameter once, always in the same grouping.

        Args:
            cotangents: s of shape (K, *output.shape).

        Raises:
            ProblemError: cotangents of another shape.
        """
        if cotangents.ndim != self.z.ndim + 1 or cotangents.shape[1:] != self.z.shape:
            raise ProblemError(
                f"cotangents must have the shape (columns, {', '.join(map(str, self.z.shape))}), got {tuple(cotangents.shape)}"
            )
        if not self._settled:
            settle(self)
            self._settled = True
        found = self.build(cotangents.detach())
        groups = self.notes.groups
        if not groups:
            groups.extend(record.params for record in found)
        return [self._in_group(group, found) for group in groups]

    def _in_group(self, group: tuple[str, ...], found: list[LayerRecord]) -> LayerRecord:
        """The records of one group of parameters put together: Gram matrices compare records across batches."""
        parts = [part for record in found if (part := record.select(group)) is not None]
        return parts[0] if len(parts) == 1 else Joint(self._place(group), parts)

    # -- making records -----------------------------------------------------------------------------------------------------

    def build(self, cotangents: Tensor) -> list[LayerRecord]:
        """Records of all parameters, grouped as the layers of this batch are."""
        gradients = self._pull(cotangents)
        self._route(gradients)
        if strange := self._misplaced(cotangents, gradients):
            notes = self.notes.reasons
            names = {name for i in strange for name in self._uses[i].roles.values()}
            notes.update(dict.fromkeys(names - notes.keys(), MISPLACED))
            return self.build(cotangents)
        columns, rows = cotangents.shape[:2]
        found: list[LayerRecord] = []
        for params, indices in self._groups(gradients):
            place = self._place(params)
            if not indices:
                found.append(Zero(place, columns, rows, self.z.new_zeros((), dtype=self.dtype)))
                continue
            uses, at_outputs = [self._uses[i] for i in indices], [gradients[i] for i in indices]
            try:
                inputs = partial(self._held, indices, rows)
                found.append(build(place, uses, at_outputs, rows, self.dtype, inputs))
            except Declined as reason:
                self.notes.reasons.update(dict.fromkeys(params, str(reason)))
        return self._in_order(found + self._explicit(cotangents))

    def _route(self, gradients: dict[int, Tensor], strange: Sequence[int] = ()) -> list[int]:
        """Find the row of every input of layers whose inputs are not the rows of the batch in their order; those without.

        A random cotangent u gives a layer deltas δ, and the cotangent with row n times n + 1 gives (n + 1) δ in those of row n.
        """
        rows = self.z.shape[0]
        uses = {i: use for i in gradients if isinstance(use := self._uses[i], DenseUse) and use.routable}
        asked = [i for i, use in uses.items() if use.routing is None and (i in strange or not use.fits(rows))]
        if not asked:
            return list(strange)
        u = random_cotangent(self.z.detach())
        numbered = u * torch.arange(1, rows + 1, device=u.device, dtype=u.dtype).reshape(-1, *[1] * (u.ndim - 1))
        pulled = self._pull(torch.stack([u, numbered]))
        for i in asked:
            if i in pulled and (owner := owners(pulled[i][0], pulled[i][1], rows)) is not None:
                uses[i].routing = Routing.of(owner, rows)
        return [i for i in strange if i not in uses or uses[i].routing is None]

    @cached_property
    def _steady(self) -> bool:
        return is_steady(self.z)

    def _misplaced(self, cotangents: Tensor, gradients: dict[int, Tensor]) -> list[int]:
        """The uses whose rows are not those of the output.

        Asked once for each batch and state of the model, and not of a model that cannot route rows by the data.
        """
        sample = self.evaluation.sample
        checked: set[tuple[int, int]] = self.problem.cached(self.evaluation.snapshot).get("rows checked", None, set)
        if (key := (sample.index, sample.rows)) in checked or self._steady:
            return []
        aligned = {i: g for i, g in gradients.items() if getattr(self._uses[i], "routing", None) is None}
        strange = self._route(gradients, misplaced(self.z, cotangents, aligned, self._pull))
        # A row without a cotangent shows nothing of its place; and loaders that shuffle give other rows next time.
        complete = cotangents.ne(0).movedim(1, 0).flatten(1).any(1).all()
        if not strange and self.problem.data.ordered and bool(complete):
            checked.add(key)
        return strange

    def _in_order(self, records: list[LayerRecord]) -> list[LayerRecord]:
        order = {name: i for i, name in enumerate(self.problem.layout.names)}
        return sorted(records, key=lambda record: order[record.params[0]])

    def _groups(self, gradients: dict[int, Tensor]) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
        """(parameters, numbers of their uses): parameters with the same uses belong to one layer."""
        layout, notes = self.problem.layout, self.notes.reasons
        groups: dict[object, tuple[list[str], tuple[int, ...]]] = {}
        for name in layout.names:
            if name in notes:
                continue
            every = [i for i, use in enumerate(self._uses) if name in use.roles.values()]
            try:
                common_form(name, [self._uses[i] for i in every])
            except Declined as reason:
                notes[name] = str(reason)
                continue
            indices = tuple(i for i in every if i in gradients) if layout.shapes[name].numel() else ()
            # What the output does not depend on has no inputs to share here, but may have on other batches (an expert).
            owner, _, own = name.rpartition(".")
            alone = owner if own in ("weight", "bias") else name
            groups.setdefault(indices or alone, ([], indices))[0].append(name)
        return [(tuple(names), indices) for names, indices in groups.values()]

    def _pull(self, cotangents: Tensor) -> dict[int, Tensor]:
        """Gradients (K, *output.shape) with respect to the outputs of all uses that the output depends on."""

        notes = self.notes.reasons
        needed = [i for i, use in enumerate(self._uses) if any(name not in notes for name in use.roles.values())]
        if not needed:
            return {}
        edges = [self._uses[i].edge for i in needed]
        problem = self.problem
        measured = problem.measured
        choice = measured.name("columns in one backward pass", "layers")
        known = measured.recalled.get(choice) if self.notes.batched is None else self.notes.batched
        gradients, batched = backward_columns(self.z, edges, cotangents.to(self.z.dtype), batched=known)
        if self.notes.batched is None and len(cotangents) > 1:
            self.notes.batched = measured.choices[choice] = batched
        pairs = zip(needed, gradients, strict=True)
        return {i: g.reshape(g.shape[0], *self._uses[i].output_shape) for i, g in pairs if g is not None}

    def _held(self, indices: tuple[int, ...], rows: int) -> GuardedInput | LinearMap:
        """The inputs of some uses, made once for all chunks of columns."""
        if indices not in self._inputs:
            first, *others = (self._uses[i] for i in indices)
            self._inputs[indices] = first.joined(others, rows, self.dtype)
        return self._inputs[indices]

    def _explicit(self, cotangents: Tensor) -> list[LayerRecord]:
        """Parameters without a rule, by per-sample gradients."""
        layout = self.problem.layout
        names = [name for name in layout.names if name in self.notes.reasons]
        if not names:
            return []
        rest = self.evaluation.over(names)
        columns = [row_gradients(rest, self.batch, column) for column in cotangents.to(self.z.dtype)]
        stacked = {name: torch.stack([found[name] for found in columns]) for name in names}
        return [Explicit(self._place((name,)), stacked[name].to(layout.dtype)) for name in names]

    def _place(self, params: tuple[str, ...]) -> ParameterGroup:
        model, shapes = self.problem.model, self.problem.layout.shapes
        owner, _, _ = params[0].rpartition(".")
        if not isinstance(model, ModuleModel):
            return ParameterGroup(params, "", None, shapes)
        # Scripted modules have no get_submodule.
        return ParameterGroup(params, owner, dict(model.module.named_modules())[owner], shapes)


def record_layers(evaluation: Evaluation) -> RecordedLayers:
    """Call the model once and keep what gives layer inputs and output deltas.

    Args:
        evaluation: a batch at a snapshot.

    Raises:
        ProblemError: rows influence each other through batch statistics; the model fails on the batch.
    """
    problem = evaluation.problem
    refuse_batch_statistics(problem.model)
    capture = Capture(problem.layout.names)
    z, leaves, form = evaluation.record(capture.watch)
    return RecordedLayers(evaluation, z, leaves, form, capture)
