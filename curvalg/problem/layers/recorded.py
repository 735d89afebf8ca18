"""One model call whose layers are watched, and the records that cotangents make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.problem.layers.capture import Capture
from curvalg.problem.layers.dense import Dense
from curvalg.problem.layers.embedding import Embedding
from curvalg.problem.layers.joint import Zero
from curvalg.problem.layers.record import Held, LayerRecord, Place
from curvalg.problem.layers.uses import Declined, Use
from curvalg.problem.layers.vectors import Explicit, Scale, Shift
from curvalg.problem.noise import uniforms
from curvalg.problem.outputs import OutputForm
from curvalg.problem.per_sample import refuse_batch_statistics, row_gradients

if TYPE_CHECKING:
    from curvalg.problem.batch import Batch
    from curvalg.problem.evaluation import Evaluation

Key = tuple[str, ...]


def record_layers(evaluation: Evaluation) -> Recorded:
    """Call the model once and watch what its parameters do.

    Raises:
        ProblemError: samples influence each other through batch statistics, or the model fails.
    """
    refuse_batch_statistics(evaluation.problem.model)
    return Recorded(evaluation)


class Recorded:
    """The layers of one batch; the graph is held, so that deltas can be taken for several chunks of columns.

    Attributes:
        batch: what terms see.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        problem = evaluation.problem
        self._layout = problem.layout
        z, form, capture = _watched(evaluation)
        self._z = z
        self.batch: Batch = evaluation.batch(z, form)
        self._rows = int(z.shape[0])
        self._reasons = {**capture.reasons, **problem.layer_notes}
        self._groups = self._grouped(capture.uses)

    # -- which parameters share a record --------------------------------------------------------------------------------

    def _grouped(self, uses: Sequence[Use]) -> dict[Key, list[Use]]:
        """Uses by the parameters that they are of; a parameter used in several ways becomes explicit."""
        groups: dict[Key, list[Use]] = {}
        for use in uses:
            groups.setdefault(tuple(use.roles.values()), []).append(use)
        owners: dict[str, set[Key]] = {}
        for key, same in groups.items():
            for name in key:
                owners.setdefault(name, set()).add(key)
            if len({(use.kind, use.form, tuple(use.roles)) for use in same}) > 1:
                for name in key:
                    self._reasons.setdefault(name, "it is used in several ways")
        for name, keys in owners.items():
            if len(keys) > 1:
                self._reasons.setdefault(name, "it is used together with different parameters")
        return groups

    # -- records --------------------------------------------------------------------------------------------------------

    def records(self, cotangents: Tensor) -> list[LayerRecord]:
        """The gradients of all columns s (K, *output.shape); they cover every chosen parameter exactly once."""
        problem = self._evaluation.problem
        records = self._assemble(cotangents)
        if not problem.layers_verified:
            failed = self._verify(cotangents, records, [p for p in self._layout.names if p not in self._reasons])
            for name in failed:
                self._reasons[name] = "its gradients from layer inputs and deltas do not add up to its gradient"
            problem.layer_notes.update(self._reasons)
            if failed:
                records = self._assemble(cotangents)
            if wrong := self._verify(cotangents, records, self._layout.names):
                raise ProblemError(f"per-sample gradients of {', '.join(wrong)} do not add up to their gradient")
            problem.layers_verified = True
        return records

    def _assemble(self, cotangents: Tensor) -> list[LayerRecord]:
        columns = cotangents.shape[0]
        factored = {key: uses for key, uses in self._groups.items() if any(name not in self._reasons for name in key)}
        deltas = self._deltas([use for uses in factored.values() for use in uses], cotangents)
        records: list[LayerRecord] = []
        covered: set[str] = set()
        for key, uses in factored.items():
            chosen = [name for name in key if name not in self._reasons]
            try:
                whole = self._record(key, uses, deltas)
            except Declined as reason:
                for name in chosen:
                    self._reasons.setdefault(name, str(reason))
                continue
            if (record := whole.select(chosen)) is not None:
                records.append(record)
                covered.update(record.params)
        rest = [name for name in self._layout.names if name not in covered]
        explicit = [name for name in rest if name in self._reasons]
        records += self._explicit(explicit, cotangents)
        like = self.batch.output.to(self._layout.dtype)
        records += [Zero(self._place((name,)), columns, self._rows, like) for name in rest if name not in self._reasons]
        order = {name: i for i, name in enumerate(self._layout.names)}
        return sorted(records, key=lambda record: order[record.params[0]])

    def _deltas(self, uses: Sequence[Use], cotangents: Tensor) -> dict[int, Tensor]:
        """Gradients with respect to the outputs of all uses (K, *output.shape), by the id of the use."""
        if not uses or not self._z.requires_grad:
            return {}
        edges = [use.edge for use in uses]
        given = cotangents.to(self._z.dtype)
        if len(given) == 1:
            one = torch.autograd.grad([self._z], edges, [given[0]], retain_graph=True, allow_unused=True)
            grads: list[Tensor | None] = [None if g is None else g[None] for g in one]
        else:
            try:
                grads = list(
                    torch.autograd.grad(
                        [self._z], edges, [given], retain_graph=True, allow_unused=True, is_grads_batched=True
                    )
                )
            except (RuntimeError, NotImplementedError):  # an operation that cannot be batched
                parts = [
                    torch.autograd.grad([self._z], edges, [c], retain_graph=True, allow_unused=True) for c in given
                ]
                grads = [None if g[0] is None else torch.stack(g) for g in zip(*parts, strict=True)]
        # An edge may be that of the output's base, which has another shape.
        return {id(use): g.reshape(-1, *use.output_shape) for use, g in zip(uses, grads, strict=True) if g is not None}

    def _record(self, key: Key, uses: Sequence[Use], deltas: Mapping[int, Tensor]) -> LayerRecord:
        live = [use for use in uses if id(use) in deltas]
        first = uses[0]
        place = self._place(key)
        dtype = self._layout.dtype
        gradients = [deltas[id(use)].detach().to(dtype) for use in live]
        if not live:
            raise Declined("the output does not depend on it")
        weight, bias = first.roles.get("weight"), first.roles.get("bias")
        if weight is None:
            parts = [use.shifts(g, self._rows) for use, g in zip(live, gradients, strict=True)]
            return Shift(place, _joined(parts, 2))
        inputs = _joined([use.inputs(self._rows, dtype) for use in live], -2 if first.kind != "embedding" else -1)
        d = _joined([use.deltas(g, self._rows) for use, g in zip(live, gradients, strict=True)], -2)
        if first.kind == "dense":
            return Dense(place, weight, bias, first.form, Held(inputs), d)
        if first.kind == "scale":
            return Scale(place, weight, bias, Held(inputs), d)
        return Embedding(place, Held(inputs), d)

    def _explicit(self, names: Sequence[str], cotangents: Tensor) -> list[LayerRecord]:
        if not names:
            return []
        rest = self._evaluation.over(names)
        columns = [row_gradients(rest, self.batch, c) for c in cotangents]
        dtype = self._layout.dtype
        return [Explicit(self._place((name,)), torch.stack([c[name] for c in columns]).to(dtype)) for name in names]

    def _place(self, names: Key) -> Place:
        shapes = {name: self._layout.shapes[name] for name in names}
        owner = names[0].rpartition(".")[0]
        module = getattr(self._evaluation.problem.model, "module", None)
        return Place(names, owner, None if module is None else module.get_submodule(owner), shapes)

    def _verify(self, cotangents: Tensor, records: Sequence[LayerRecord], names: Sequence[str]) -> list[str]:
        """Parameters whose gradients, summed with random positive weights, are not those of one backward pass."""
        z = self.batch.output
        shape = (cotangents.shape[0], self._rows)
        weights = 0.5 + uniforms(0, 1, 0, (shape[0] * shape[1],), z.dtype, z.device)[0].reshape(shape)
        spread = weights.reshape(*shape, *[1] * (cotangents.ndim - 2))
        expected = self._layout.unflatten(self.batch.vjp((spread * cotangents).sum(0)))
        combined = {name: g[0] for record in records for name, g in record.combine(weights[None]).items()}
        scale = max(float(e.abs().max()) for e in expected.values())
        eps = 1e3 * torch.finfo(z.dtype).eps
        failed = []
        for name in names:
            error = float((combined[name] - expected[name]).abs().max())
            if not error <= eps * max(float(expected[name].abs().max()), 1e-3 * scale):
                failed.append(name)
        return failed


def _watched(evaluation: Evaluation) -> tuple[Tensor, OutputForm, Capture]:
    leaves = [value.requires_grad_() for value in evaluation.values()]
    capture = Capture(evaluation.problem.layout.names).watch(leaves)
    with capture:
        z, form = evaluation.run(leaves)
    return z, form, capture


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)
