"""The check that the records of a batch are the gradients.

A rule's formula is trusted for a parameter after one comparison, of a few rows. Which row is which may depend on the data
(models that sort by length, experts that choose their inputs), and is checked for all that is handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Protocol

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.problem.layers.notes import LayerNotes
from curvalg.problem.model.layer_record import LayerRecord
from curvalg.tensors.memory import wide
from curvalg.tensors.random_numbers import uniforms

COLUMNS = 1
"""Columns of a comparison; what could be wrong is which rows a gradient belongs to."""

SPARE = 1e2
"""Single gradients may be off by this many times the rounding that was measured."""

ROWS = 4
"""Rows that are enough for a comparison, where they can be computed without the others of a large batch."""


MISPLACED = "its gradients do not add up: the rows of its layer are not those of the batch"
"""Why a parameter has no layer inputs and deltas where :func:`misplaced` found it."""


class Comparable(Protocol):
    """The recording of a model's layers, as far as a comparison needs it."""

    z: Tensor
    leaves: dict[str, Tensor]
    dtype: torch.dtype
    notes: LayerNotes

    @property
    def used(self) -> set[str]:
        """The parameters that some function of the table takes."""
        ...

    def dtypes(self, name: str) -> set[torch.dtype]:
        """The dtypes of the outputs of all functions that take a parameter."""
        ...

    def head(self, rows: int) -> Comparable | None:
        """The recording of the first rows alone, or None."""
        ...

    def build(self, cotangents: Tensor) -> list[LayerRecord]:
        """Build the records of all parameters."""
        ...

    @property
    def operations(self) -> frozenset[str]:
        """The names of the operations that the output was computed by."""
        ...

    @property
    def rows(self) -> int:
        """The rows of the output that are computed apart from each other, or groups of these."""
        ...

    @property
    def fold(self) -> int:
        """The rows of the output that are computed together."""
        ...

    def respread(self, name: str) -> bool:
        """Take the picked rows of a table for the same in all rows of the batch; whether that is new and can be."""
        ...

    def gradients(self, names: Sequence[str], cotangent: Tensor) -> dict[str, Tensor]:
        """The gradients Jᵀu of some parameters by an ordinary backward pass."""
        ...

    def like_gradient(self, name: str, whole: Tensor) -> Tensor:
        """What a tensor of the shape of a parameter has of the numbers that :meth:`gradients` has."""
        ...

    def lengths(self, tensors: Sequence[Tensor]) -> list[float]:
        """The lengths of tensors like gradients."""
        ...


def settle(recorded: Comparable) -> None:
    """Find the parameters of a batch whose records would be wrong, and note them on the problem.

    Compared are Σ wₖₙ gₖₙ, for cotangents of random signs and random positive weights w, and one ordinary backward pass
    with the cotangents Σ wₖₙ sₖₙ: equal only if the gradients are right and belong to the right rows.

    Raises:
        ProblemError: a parameter's gradients are wrong on every route.
    """
    note_unseen(recorded)
    notes, met = recorded.notes, recorded.operations
    if new := met - notes.operations:  # which may mix rows that none did before
        notes.compared.clear()
    if _unchecked(recorded):
        few = recorded.head(ROWS)
        recorded = few if few is not None and new <= few.operations else recorded
    notes.operations |= met
    # At worst: the rounding is measured, rows are found to be computed together, each parameter is respread and then noted.
    for _ in range(2 * len(recorded.leaves) + 3):
        if not (unchecked := _unchecked(recorded)) or not _compare(recorded, unchecked):
            return
    raise AssertionError("unreachable: every repetition finds out something new")


def _unchecked(recorded: Comparable) -> list[str]:
    notes = recorded.notes
    # With a single row nothing can be attributed wrongly: such a comparison says little about other batches.
    needed = min(recorded.z.shape[0], 2)
    return [
        name
        for name in recorded.leaves
        if (name in recorded.used or name in notes.reasons) and notes.compared.get(name, 0) < needed
    ]


def note_unseen(recorded: Comparable) -> None:
    """Parameters that reach the output where no torch function shows them (custom autograd functions)."""
    notes = recorded.notes.reasons
    unseen = [name for name in recorded.leaves if name not in recorded.used and name not in notes]
    if not unseen:
        return
    z = recorded.z
    draws = uniforms(3, 1, 0, z.shape, z.dtype, z.device)[0]
    for name, gradient in recorded.gradients(unseen, draws).items():
        if recorded.lengths([gradient]) != [0.0]:
            notes[name] = "it is used where no function of torch shows it"


def _compare(recorded: Comparable, names: list[str]) -> bool:
    """Compare once; whether a parameter was noted, so that the comparison has to be made again."""
    notes, z, rows = recorded.notes, recorded.z, recorded.rows
    signed = 2 * uniforms(1, COLUMNS, 0, z.shape, z.dtype, z.device) - 1
    weights = 0.5 + uniforms(2, COLUMNS, 0, (rows,), z.dtype, z.device)
    each = weights.repeat_interleave(recorded.fold, 1)
    mixed = (each.reshape(COLUMNS, -1, *[1] * (z.ndim - 1)) * signed).sum(0)
    before = set(notes.reasons)
    records = recorded.build(signed)
    if notes.reasons.keys() - before or recorded.rows != rows:
        return True  # building has shown it already, without numbers
    expected = recorded.gradients(list(recorded.leaves), mixed)
    errors: dict[str, Tensor] = {}
    for record in records:
        for name, got in record.combine(weights[None].to(recorded.dtype)).items():
            errors[name] = recorded.like_gradient(name, got[0]) - expected[name]
    norms, lengths = (recorded.lengths([of[name] for name in expected]) for of in (expected, errors))
    sizes = {name: (norm, error) for name, norm, error in zip(expected, norms, lengths, strict=True)}
    whole = sum(norm**2 for norm in norms) ** 0.5
    failed = False
    for name in names:
        norm, error = sizes[name]
        noted = name in before
        # Rounded as the model rounds, in the dtypes that it casts to; under autocast a layer has less than its parameters.
        dtypes = {recorded.leaves[name].dtype, *recorded.dtypes(name)}
        allowed = (5e-2 if noted else rounding(recorded, dtypes)) * (norm + 1e-2 * whole)
        if not error <= allowed and recorded.notes.noise is None:
            recorded.notes.noise = measured_noise(recorded, mixed, expected)
            return True
        if not error <= allowed:
            if noted:
                raise ProblemError(
                    f"the gradients of single rows with respect to {name!r} do not add up to those of the batch (relative "
                    f"error {error / (norm or 1.0):.1e}); is the model's output the same in every call?"
                )
            failed = True
            if not recorded.respread(name):
                notes.reasons[name] = "its gradients from layer inputs and deltas do not add up to its gradient"
        elif (
            allowed < 0.1 * norm
        ):  # what vanishes beside the rest says nothing, and is compared again on the next batch
            notes.compared[name] = min(rows, 2)
    return failed


def misplaced(
    recorded: Comparable,
    cotangents: Tensor,
    gradients: Mapping[int, Tensor],
    pull: Callable[[Tensor], dict[int, Tensor]],
) -> list[int]:
    """The uses whose rows are not those of the output.

    Where row n of the output depends on row n of a use and on no other, cotangents Σₖ aₖ wₙ sₖₙ give wₙ Σₖ aₖ δₖₙ in the same
    row, for any numbers a and w: one more backward pass shows it.

    Args:
        recorded: the recording.
        cotangents: s (K, *z.shape).
        gradients: δ by number of the use, (K, *shape of its output).
        pull: s -> δ.
    """
    z = recorded.z
    columns, rows = len(cotangents), recorded.rows
    if rows == 1 or not gradients:
        return []
    mixing = 0.5 + uniforms(4, 1, 0, (columns,), z.dtype, z.device)[0]
    weights = 0.5 + uniforms(5, 1, 0, (rows,), z.dtype, z.device)[0]
    each = weights.repeat_interleave(recorded.fold)
    mixed = torch.tensordot(mixing, cotangents.to(z.dtype), 1) * each.reshape(-1, *[1] * (z.ndim - 1))
    pulled, found = pull(mixed[None]), []
    for i, delta in gradients.items():
        if delta[0].numel() % rows:  # its rule declines such tensors itself
            continue
        expected = torch.tensordot(mixing.to(delta.dtype), delta, 1).reshape(rows, -1)
        expected = expected * weights.to(delta.dtype)[:, None]
        other = pulled.get(i)
        got = torch.zeros_like(expected) if other is None else other[0].reshape(rows, -1)
        size = expected.norm(dim=1) + 1e-2 * expected.norm() / rows**0.5
        if bool(((got - expected).norm(dim=1) > rounding(recorded, {delta.dtype}) * size).any()):
            found.append(i)
    if found and recorded.notes.noise is None:
        recorded.notes.noise = measured_noise(recorded, mixed, recorded.gradients(list(recorded.leaves), mixed))
        return misplaced(recorded, cotangents, gradients, pull)
    return found


def owners(deltas: Tensor, numbered: Tensor, rows: int, tolerance: float) -> Tensor | None:
    """The row of the batch that each input of a layer belongs to (L,); None where that is not known.

    Args:
        deltas: δ (L..., out) for a cotangent u.
        numbered: δ for the cotangent with row n times n + 1.
        rows: n.
        tolerance: relative, of rounding.
    """
    a, b = (wide(t.reshape(-1, t.shape[-1])) for t in (deltas, numbered))
    size = a.square().sum(1)
    known = size > 0
    ratio = (a * b).sum(1) / size.where(known, torch.ones_like(size))
    owner = ratio.round().long() - 1
    error = (b - ratio.round()[:, None] * a).norm(dim=1)
    allowed = rows * tolerance * size.sqrt()
    if bool((known & ((owner < 0) | (owner >= rows) | (error > allowed))).any()) or not bool(known.any()):
        return None
    # An input that nothing depends on has no gradient in any row; it counts beside the input before it.
    last = torch.where(known, torch.arange(len(owner), device=owner.device), -1).cummax(0).values
    first = int(known.nonzero()[0])
    return owner[last.where(last >= 0, torch.full_like(last, first))]


def rounding(recorded: Comparable, dtypes: Set[torch.dtype]) -> float:
    """The relative round-off of gradients: of the dtypes, or as measured; what is wrong is wrong by far more."""
    z = recorded.z
    eps = max(torch.finfo(dtype).eps for dtype in (*dtypes, z.dtype))
    if z.device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        eps = max(eps, 1e-5)
    return min(max(1e3 * eps, SPARE * (recorded.notes.noise or 0.0)), 5e-2)


def measured_noise(recorded: Comparable, cotangent: Tensor, gradients: Mapping[str, Tensor]) -> float:
    """How far the model's gradients are from linear in the cotangent, relative: parts of it may round to fewer digits.

    Args:
        recorded: the recording.
        cotangent: u.
        gradients: Jᵀu.
    """
    third = recorded.gradients(list(gradients), cotangent / 3)
    errors = recorded.lengths([3 * third[name] - g for name, g in gradients.items()])
    sizes = recorded.lengths(list(gradients.values()))
    return max((error / size for error, size in zip(errors, sizes, strict=True) if size > 0), default=0.0)
