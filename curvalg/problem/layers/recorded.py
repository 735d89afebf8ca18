"""A recorded model call that gives layer inputs and output deltas for several chunks of columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvalg.errors import ProblemError
from curvalg.problem.batch import lazy
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.layers.build import Portion, build, portions
from curvalg.problem.layers.capture import Capture
from curvalg.problem.layers.kinds.joint import Joint, Zero
from curvalg.problem.layers.kinds.maps import LinearMap
from curvalg.problem.layers.kinds.regrouped import Regrouped, apart
from curvalg.problem.layers.kinds.scaling import Explicit
from curvalg.problem.layers.notes import LayerNotes
from curvalg.problem.layers.origin import Origin
from curvalg.problem.layers.per_sample import refuse_batch_statistics, row_gradients
from curvalg.problem.layers.routing import is_steady
from curvalg.problem.layers.uses import Declined, EmbeddingUse, Routing, SpreadTableUse, Use
from curvalg.problem.layers.verify import MISPLACED, misplaced, note_unseen, owners, rounding, settle
from curvalg.problem.model.layer_record import GuardedInput, LayerRecord, ParameterGroup
from curvalg.problem.model.model import ModuleModel
from curvalg.problem.model.outputs import OutputForm
from curvalg.problem.verification.tangent_checks import random_cotangent
from curvalg.tensors import trees
from curvalg.tensors.backward import backward, backward_columns

Watching = Callable[[list[Tensor]], AbstractContextManager[Any]]


class RecordedLayers:
    """The graph of one model call, and all that its layers saw.

    Args:
        evaluation: of the batch.
        z: the output, with its graph.
        leaves: the tensors that stand for the parameters.
        form: how z came from what the model returned.
        capture: what happened to the leaves.
        compared: whether records are compared with gradients before they are handed out.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        z: Tensor,
        leaves: list[Tensor],
        form: OutputForm,
        capture: Capture,
        *,
        compared: bool = True,
    ) -> None:
        # The batch holds no recording that holds the batch: graphs are freed when they are done with.
        alive, kind = ref(self), type(self)
        self.batch = evaluation.batch(z, form, layers=lambda: alive() or record_layers(again(), kind=kind))
        again = evaluation.again()
        self.evaluation = evaluation
        self.problem = evaluation.problem
        self.dtype, self.notes = self.problem.dtype, self.problem.noted(LayerNotes)
        self.z = z
        self.leaves = dict(zip(self.problem.layout.names, leaves, strict=True))
        self._found = capture.uses
        self.notes.spread |= capture.spread
        self._inputs: dict[tuple[int, ...], GuardedInput | LinearMap] = {}
        self._settled, self._compared = False, compared
        for name, reason in capture.reasons.items():
            self.notes.reasons.setdefault(name, reason)

    @staticmethod
    def watching(evaluation: Evaluation, capture: Capture) -> Watching:
        """What a call of the model is watched by: leaves -> a context around it."""
        return capture.watch

    def gradients(self, names: Sequence[str], cotangent: Tensor) -> dict[str, Tensor]:
        """The gradients Jᵀu of some parameters, by one backward pass."""
        leaves = [self.leaves[name] for name in names]
        found = backward([self.z], leaves, [cotangent], retain_graph=True)
        return {
            name: torch.zeros_like(leaf, dtype=self.dtype) if gradient is None else gradient.to(self.dtype)
            for name, leaf, gradient in zip(names, leaves, found, strict=True)
        }

    def like_gradient(self, name: str, whole: Tensor) -> Tensor:
        """What a tensor of the shape of a parameter has of the numbers that :meth:`gradients` has."""
        return whole

    def lengths(self, tensors: Sequence[Tensor]) -> list[float]:
        """The lengths of tensors like gradients."""
        return [float(t.norm()) for t in tensors]

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of the parameters, as the model has them."""
        return self.problem.layout.whole.shapes

    @property
    def used(self) -> set[str]:
        """The parameters that some function of the table takes."""
        return {name for use in self._found for name in use.names}

    @property
    def _uses(self) -> list[Use]:
        """The uses that count, by their numbers: of a table those on the rows of the batch, or those where it meets them."""
        met = {name for use in self._found if isinstance(use, SpreadTableUse) for name in use.names}
        spread = self.notes.spread & met  # in a batch of one row they are the same, and nothing is spread
        return [
            use
            for use in self._found
            if not isinstance(use, EmbeddingUse) or isinstance(use, SpreadTableUse) == (use.names <= spread)
        ]

    @property
    def fold(self) -> int:
        """The rows of the output that are computed together: a sequence of which each token is a row."""
        return self._foldable if self.notes.folded else 1

    @property
    def operations(self) -> frozenset[str]:
        """The names of the operations that the output was computed by."""
        return frozenset(self.evaluation.operations)

    @property
    def rows(self) -> int:
        """The rows of the output that are computed apart from each other, or groups of these."""
        return self.z.shape[0] // self.fold

    @lazy
    def _foldable(self) -> int:
        """The number of rows of the output for each row of the inputs; 1 where there are not several."""
        rows = self.z.shape[0]
        sizes = {len(t) for t in trees.tensors(self.evaluation.sample.batch) if t.ndim}
        return rows // max((size for size in sizes if 0 < size < rows and rows % size == 0), default=rows)

    def respread(self, name: str) -> bool:
        """Take the picked rows of a table for the same in all rows of the batch; whether that is new and can be."""
        if name in self.notes.spread or not any(isinstance(u, SpreadTableUse) and name in u.names for u in self._found):
            return False
        self.notes.spread.add(name)
        return True

    def dtypes(self, name: str) -> set[torch.dtype]:
        """The dtypes of the outputs of all functions that take a parameter."""
        return {use.output_dtype for use in self._uses if name in use.names}

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
            few = record_layers(evaluation, kind=type(self))
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

    def records(self, cotangents: Tensor, *, independent: bool = False) -> list[LayerRecord]:
        """Records that cover every chosen parameter once, always in the same grouping.

        Args:
            cotangents: s of shape (K, *output.shape).
            independent: whether rows of a column are draws whose products with each other vanish in the mean, so that rows
                that the model computes together may be one row of the records.

        Raises:
            ProblemError: cotangents of another shape.
        """
        if cotangents.ndim != self.z.ndim + 1 or cotangents.shape[1:] != self.z.shape:
            raise ProblemError(
                f"cotangents must have the shape (columns, {', '.join(map(str, self.z.shape))}), got {tuple(cotangents.shape)}"
            )
        self._settle()
        fold = self.fold
        found = self.build(cotangents.detach() if fold == 1 or independent else apart(cotangents.detach(), fold))
        if self.fold != fold:  # this batch has shown it
            return self.records(cotangents, independent=independent)
        groups = self.notes.groups
        if not self._compared:  # they may still turn out to be others
            groups = [record.params for record in found]
        elif not groups:
            groups.extend(record.params for record in found)
        records = [self._in_group(group, found) for group in groups]
        return records if fold == 1 or independent else [Regrouped(record, fold) for record in records]

    def _settle(self) -> None:
        if not self._settled:
            settle(self) if self._compared else note_unseen(self)
            self._settled = True

    def most_bytes(self) -> int:
        """The bytes that the gradients of one column may take in records, at the most, before any is computed."""
        self._settle()
        at_outputs = sum(use.output_shape.numel() for use in self._uses)
        by_rows = sum(self.leaves[name].numel() for name in self.notes.reasons if name in self.leaves)
        return self.fold * self.dtype.itemsize * (at_outputs + self.rows * by_rows)

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
            if self.notes.folded is not False and self._foldable > 1:
                self.notes.folded = self.notes.folded is None  # groups are tried once
                uses = self._uses
                for i in gradients:
                    uses[i].routing = None
                return self.build(cotangents)
            uses = self._uses
            moved = {name for i in strange for name in uses[i].names}
            wrong = {name for name in moved if not self.respread(name)} - self.notes.reasons.keys()
            self.notes.reasons.update(dict.fromkeys(wrong, MISPLACED))
            return self.build(cotangents)
        columns, rows, all_uses = len(cotangents), self.rows, self._uses
        found: list[LayerRecord] = []
        for members, indices in self._groups(gradients):
            names = tuple(dict.fromkeys(portion.origin.name for portion in members.values()))
            if not indices:
                found.append(Zero(self._place(names), columns, rows, self.z.new_zeros((), dtype=self.dtype)))
                continue
            uses, at_outputs = [all_uses[i] for i in indices], [gradients[i] for i in indices]
            try:
                inputs = partial(self._held, uses, rows)
                place = self._place(names, members)
                found.append(build(place, members, uses, at_outputs, rows, self.dtype, inputs))
            except Declined as reason:
                if any(self.respread(name) for name in names):
                    return self.build(cotangents)
                self.notes.reasons.update(dict.fromkeys(names, str(reason)))
        return self._in_order(self._whole(found) + self._explicit(cotangents))

    def _whole(self, found: list[LayerRecord]) -> list[LayerRecord]:
        """Records of whole parameters: those of portions, of which a parameter has several or rearranged ones, put together."""
        origins, refused = self._origins, self.notes.reasons
        clusters: list[tuple[set[str], list[LayerRecord]]] = []
        for record in found:
            names = {origins[own].name for own in record.params} - refused.keys()
            own = [name for name in record.params if origins[name].name in names]
            if not own:
                continue
            part = record if len(own) == len(record.params) else record.select(own)
            assert part is not None
            parts = [part]
            for cluster in [c for c in clusters if c[0] & names]:
                clusters.remove(cluster)
                names, parts = names | cluster[0], cluster[1] + parts
            clusters.append((names, parts))
        return [
            parts[0]
            if len(parts) == 1 and names == set(parts[0].params)
            else Joint(self._place(tuple(n for n in self.problem.layout.names if n in names)), parts, origins)
            for names, parts in clusters
        ]

    def _route(self, gradients: dict[int, Tensor], strange: Sequence[int] = ()) -> list[int]:
        """Find the row of every input of layers whose inputs are not the rows of the batch in their order; those without.

        A random cotangent u gives a layer deltas δ, and the cotangent with row n times n + 1 gives (n + 1) δ in those of row n.
        """
        rows, every = self.rows, self._uses
        uses = {i: use for i in gradients if (use := every[i]).routable}
        asked = [i for i, use in uses.items() if use.routing is None and (i in strange or not use.fits(rows))]
        if not asked:
            return list(strange)
        u = random_cotangent(self.z.detach())
        numbers = torch.arange(1, rows + 1, device=u.device, dtype=u.dtype).repeat_interleave(self.fold)
        numbered = u * numbers.reshape(-1, *[1] * (u.ndim - 1))
        pulled = self._pull(torch.stack([u, numbered]))
        for i in asked:
            if i not in pulled:
                continue
            plain, counted = uses[i].arranged(pulled[i]).unbind()
            owner = owners(plain, counted, rows, rounding(self, {pulled[i].dtype}))
            if owner is not None:
                uses[i].routing = Routing.of(owner, rows)
        return [i for i in strange if i not in uses or uses[i].routing is None]

    @lazy
    def _steady(self) -> bool:
        return is_steady(self.z)

    def _misplaced(self, cotangents: Tensor, gradients: dict[int, Tensor]) -> list[int]:
        """The uses whose rows are not those of the output.

        Asked once for each batch and state of the model, and not of a model that cannot route rows by the data.
        """
        sample = self.evaluation.sample
        checked: set[tuple[int, int, int]] = self.problem.cached(self.evaluation.snapshot).get(
            "rows checked", None, set
        )
        if (key := (sample.index, sample.rows, self.fold)) in checked or self._steady:
            return []
        uses = self._uses

        def arranged(found: dict[int, Tensor]) -> dict[int, Tensor]:
            return {i: uses[i].arranged(g) for i, g in found.items()}

        def pull(s: Tensor) -> dict[int, Tensor]:
            return arranged(self._pull(s))

        aligned = {i: g for i, g in gradients.items() if uses[i].routing is None}
        strange = self._route(gradients, misplaced(self, cotangents, arranged(aligned), pull))
        # A row without a cotangent shows nothing of its place; and loaders that shuffle give other rows next time. Where
        # inputs lie in other rows, although their number fits, the next recording of the batch has to find that again.
        complete = cotangents.ne(0).movedim(1, 0).flatten(1).any(1).all()
        if not strange and not self._silently_routed and self.problem.data.ordered and bool(complete):
            checked.add(key)
        return strange

    @property
    def _silently_routed(self) -> bool:
        """Whether inputs of a layer are in other rows than their number says."""
        return any(use.routing is not None and use.fits(self.rows) for use in self._uses)

    def _in_order(self, records: list[LayerRecord]) -> list[LayerRecord]:
        order = {name: i for i, name in enumerate(self.problem.layout.names)}
        return sorted(records, key=lambda record: order[record.params[0]])

    def _groups(self, gradients: dict[int, Tensor]) -> list[tuple[dict[str, Portion], tuple[int, ...]]]:
        """The groups (portions of parameters by name, numbers of their uses): what has the same uses belongs to one layer."""
        layout, shapes, uses = self.problem.layout, self.shapes, self._uses
        groups: dict[object, tuple[dict[str, Portion], tuple[int, ...]]] = {}
        self._origins: dict[str, Origin] = {}
        for name in layout.names:
            if name in self.notes.reasons:
                continue
            found = portions(name, uses) if shapes[name].numel() else {}
            live = {portion: tuple(i for i in every if i in gradients) for portion, every in found.items()}
            live = {portion: indices for portion, indices in live.items() if indices}
            # What the output does not depend on has no inputs to share here, but may have on other batches (an expert).
            owner, _, last = name.rpartition(".")
            alone = owner if last in ("weight", "bias") else name
            for portion, indices in (live or {Portion(Origin(name), None): ()}).items():
                plain = len(live) < 2 and not portion.origin.steps
                own = name if plain else f"{name} {portion.form[0]} {[step.label for step in portion.origin.steps]}"
                self._origins[own] = portion.origin
                groups.setdefault(indices or alone, ({}, indices))[0][own] = portion
        return list(groups.values())

    def _pull(self, cotangents: Tensor) -> dict[int, Tensor]:
        """Gradients (K, *output.shape) with respect to the outputs of all uses that the output depends on."""
        notes, uses = self.notes.reasons, self._uses
        needed = [i for i, use in enumerate(uses) if use.names - notes.keys()]
        if not needed:
            return {}
        edges = [uses[i].edge for i in needed]
        pairs = zip(needed, self._columns_back(edges, cotangents.to(self.z.dtype)), strict=True)
        return {i: g.reshape(g.shape[0], *uses[i].output_shape) for i, g in pairs if g is not None and g.numel()}

    def _columns_back(self, edges: list[GradientEdge], cotangents: Tensor) -> list[Tensor | None]:
        """Gradients (K, ...) that arrive at edges; in one backward pass or one for each column, whichever was faster."""
        measured = self.problem.measured
        choice = measured.name("columns in one backward pass", "layers")
        known = measured.recalled.get(choice) if self.notes.batched is None else self.notes.batched
        gradients, batched = backward_columns(self.z, edges, cotangents, batched=known)
        if self.notes.batched is None and len(cotangents) > 1:
            self.notes.batched = measured.choices[choice] = batched
        return gradients

    def _held(self, uses: Sequence[Use], rows: int) -> GuardedInput | LinearMap:
        """The inputs of some uses, made once for all chunks of columns."""
        key = tuple(map(id, uses))
        if key not in self._inputs:
            self._inputs[key] = uses[0].joined(uses[1:], rows, self.dtype)
        return self._inputs[key]

    def _explicit(self, cotangents: Tensor) -> list[LayerRecord]:
        """Parameters without a rule, by per-sample gradients."""
        layout = self.problem.layout
        names = [name for name in layout.names if name in self.notes.reasons]
        if not names:
            return []
        rest = self.evaluation.over(names)
        columns = [self._by_group(row_gradients(rest, self.batch, column)) for column in cotangents.to(self.z.dtype)]
        stacked = {name: torch.stack([found[name] for found in columns]) for name in names}
        reasons = self.notes.reasons
        return [Explicit(self._place((name,)), stacked[name].to(layout.dtype), reasons[name]) for name in names]

    def _by_group(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of rows of the output, added up in the groups that are computed together."""
        if self.fold == 1:
            return gradients
        return {name: g.unflatten(0, (self.rows, self.fold)).sum(1) for name, g in gradients.items()}

    def _place(self, params: tuple[str, ...], members: Mapping[str, Portion] | None = None) -> ParameterGroup:
        """The group of some parameters, or of portions of them."""
        model, shapes = self.problem.model, self.shapes
        owner, _, _ = params[0].rpartition(".")
        if members is not None:
            shapes = {own: m.origin.shape(shapes[m.origin.name]) for own, m in members.items()}
            params = tuple(members)
        if not isinstance(model, ModuleModel):
            return ParameterGroup(params, "", None, shapes)
        # Scripted modules have no get_submodule.
        return ParameterGroup(params, owner, dict(model.module.named_modules())[owner], shapes)


def record_layers(
    evaluation: Evaluation, *, compared: bool = True, kind: type[RecordedLayers] = RecordedLayers
) -> RecordedLayers:
    """Call the model once and keep what gives layer inputs and output deltas.

    Args:
        evaluation: a batch at a snapshot.
        compared: whether records are compared with gradients before they are handed out.
        kind: of the recording.

    Raises:
        ProblemError: rows influence each other through batch statistics; the model fails on the batch.
    """
    problem = evaluation.problem
    refuse_batch_statistics(problem.model)
    capture = Capture(problem.layout.names)
    z, leaves, form = evaluation.record(kind.watching(evaluation, capture))
    return kind(evaluation, z, leaves, form, capture, compared=compared)
