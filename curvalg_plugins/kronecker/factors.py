"""Kronecker factors of one layer from its inputs h and output deltas δ, summed over the data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from curvalg import Batch, LayerRecord
    from curvalg_plugins.kronecker.options import Approximation, Fisher


FIRST = 32
"""Columns that the memory of one is found by, where there are more."""
COPIES = 4
"""How many times as much as the columns and deltas a backward pass takes for them."""


def layers_in_parts(batch: Batch, fisher: Fisher, samples: int, seed: int) -> Iterator[list[LayerRecord]]:
    """The layers for all columns s whose outer products make the curvature in output space, some columns at a time.

    Exact columns are those of B: of a language model as many for each row as it has positions times words.

    Args:
        batch: the batch.
        fisher: "exact" columns of B, "mc" draws of it, or "empirical" gradients.
        samples: draws.
        seed: of the draws.

    Raises:
        LossError: exact columns or draws of a B that is not positive semi-definite.
    """
    if fisher != "exact":
        yield list(batch.layers(few_columns(batch, fisher, samples, seed)))
        return
    count, at = batch.loss_rank, 0
    output = batch.output.numel() * batch.output.element_size()
    width = max(1, min(FIRST, count, batch.workspace // (COPIES * max(output, 1))))
    while at < count:
        stop = min(at + width, count)
        records = list(batch.layers(batch.row_factor(start=at, stop=stop)))
        if at == 0:
            deltas = sum(record.nbytes - record.input_bytes for record in records) // width
            width = max(1, batch.workspace // (COPIES * max(output + deltas, 1)))
        yield records
        del records
        at = stop


def few_columns(batch: Batch, fisher: Fisher, samples: int, seed: int) -> Tensor:
    """Draws of B, or the gradients: one column for each draw of a sample, or for each sample."""
    if fisher == "mc":
        return batch.per_sample_columns(batch.pseudo_gradients(samples, seed=seed))
    return batch.gradient_columns()


def cost(label: str, batch: Batch, fisher: Fisher, samples: int, passes: int) -> str:
    """What the columns cost, for people: how many there are in a row of the data, a backward pass for each.

    Args:
        label: of the matrix.
        batch: any batch.
        fisher: the columns.
        samples: draws, of "mc".
        passes: over the data.
    """
    each = batch.gradient_columns().shape[0]
    drawn = samples if fisher == "mc" else 1
    counts = {"exact": batch.loss_rank, "mc": drawn * each, "empirical": each}
    what = {"exact": "exact columns of the loss", "mc": "draws", "empirical": "gradients"}[fisher]
    twice = ", in each of two passes over the data" if passes == 2 else ""
    others = ", ".join(f"fisher={kind!r} takes {count:,}" for kind, count in counts.items() if kind != fisher)
    return f"{label}: {what}, {counts[fisher]:,} for each row, a backward pass over a batch for each{twice}; {others}"


TABLE_LIMIT = 4096
"""The most rows of an embedding table whose input factor, rows x rows, is built."""


def factored(record: LayerRecord) -> bool:
    """Whether a layer has Kronecker factors: one weight that multiplies all inputs or patches.

    A transposed convolution lies input channels first and its kernel last, which is no Kronecker product in that order. The
    groups of a convolution each multiply inputs of their own: one input factor for all of them is no approximation.
    """
    if record.kind == "embedding":
        return record.shapes[record.params[0]][0] <= TABLE_LIMIT
    plain = record.kind == "dense" and record.deltas.ndim == 4
    return plain and (not record.transposed or len(record.shapes[record.params[0]]) == 2)


def inputs_first(record: LayerRecord) -> bool:
    """Whether the weight lies as (inputs, outputs): tables, and matrices that multiply from the right."""
    return record.kind == "embedding" or record.transposed


def inputs_and_deltas(record: LayerRecord) -> tuple[Tensor, Tensor]:
    """The inputs (n, T, in) and deltas (K, n, T, out)."""
    h, d = record.inputs, record.deltas
    assert h is not None
    if record.kind == "embedding":
        h = torch.nn.functional.one_hot(h, record.shapes[record.params[0]][0]).to(d.dtype)
    return h, d


def active_rows(batch: Batch) -> Tensor | None:
    """Rows whose share is not identically zero (n,), None for all: ignored ones count in no mean."""
    weights = batch.weights.expand(batch.output.shape)
    active = (weights.reshape(weights.shape[0], -1) != 0).any(1)
    return None if bool(active.all()) else active


PANELS = 4
"""Panels that a wide Gram matrix is made in."""

WIDE = 128


def gram(x: Tensor) -> Tensor:
    """The product xᵀx for x (n, m), exactly symmetric; of a wide one only upper panels are multiplied, and mirrored."""
    width = x.shape[1]
    step = -(-width // PANELS) if width >= WIDE else max(width, 1)
    result = x.new_empty(width, width)
    for at in range(0, width, step):
        panel = x[:, at : at + step].T @ x[:, at:]
        square = panel[:, :step]
        panel[:, :step] = (square + square.T) / 2  # equal up to rounding
        result[at : at + step, at:] = panel
        result[at:, at : at + step] = panel.T
    return result


def input_factor(
    h: Tensor, active: Tensor | None, approximation: Approximation, bias: bool, real: Tensor | None = None
) -> tuple[Tensor, float]:
    """The sum Σ h hᵀ over active rows (None: all), and the number of summands, for h (n, T, in).

    With a bias of h followed by a one. Positions that are not ``real`` (None: all are) hold zeros and do not count.
    """
    if active is not None:
        h, real = h[active], None if real is None else real[active]
    if real is not None and approximation == "reduce":
        some = real.sum(1)
        h, real = h.sum(1, keepdim=True) / some.clamp_min(1)[:, None, None], (some > 0)[:, None]
    elif approximation == "reduce":
        h = h.mean(1, keepdim=True)
    flat = h.flatten(0, 1)
    count = flat.shape[0] if real is None else int(real.sum())
    if not bias:
        return gram(flat), float(count)
    width = flat.shape[1]
    factor = flat.new_empty(width + 1, width + 1)
    factor[:-1, :-1] = gram(flat)
    factor[-1, :-1] = factor[:-1, -1] = flat.sum(0)
    factor[-1, -1] = count
    return factor, float(count)


def output_factor(d: Tensor, approximation: Approximation) -> Tensor:
    """The sum Σ δ δᵀ for δ (K, n, T, out)."""
    if approximation == "reduce":
        d = d.sum(2)
    return gram(d.flatten(0, -2))


def split_damping(output: Tensor, inputs: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Factors (B + √c/π I, A + π√c I) with π² = (tr A / dim A) / (tr B / dim B): Martens and Grosse, arXiv 1503.05671, §6.3."""
    a, b = float(inputs.trace()) / len(inputs), float(output.trace()) / len(output)
    pi = math.sqrt(a / b) if a > 0 and b > 0 else 1.0
    root = math.sqrt(damping)
    eye = torch.eye
    return (
        output + root / pi * eye(len(output), dtype=output.dtype, device=output.device),
        inputs + pi * root * eye(len(inputs), dtype=inputs.dtype, device=inputs.device),
    )


def eigenvectors(matrix: Tensor) -> Tensor:
    """The eigenvectors of a symmetric matrix; by float64 on the CPU where its own precision does not converge."""
    try:
        vectors: Tensor = torch.linalg.eigh(matrix)[1]
        if bool(torch.isfinite(vectors).all()):
            return vectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    double: Tensor = torch.linalg.eigh(matrix.cpu().double())[1]
    return double.to(matrix)


CHUNK = 2**22
"""Numbers in the gradients that are held at a time."""


def second_moments(h: Tensor, d: Tensor, output: Tensor, inputs: Tensor) -> Tensor:
    """Second moments Σ_kn [(Q_Bᵀ dW Q_A)_ij]² with dW = Σ_t δ hᵀ, shape (out, in).

    Args:
        h: (n, T, in), followed by a one where Q_A has a row more.
        d: δ (K, n, T, out).
        output: Q_B.
        inputs: Q_A.
    """
    columns, rows, positions, out = d.shape
    if positions == 1:
        return (d[:, :, 0] @ output).square().sum(0).T @ _rotate(h[:, 0], inputs).square()
    early = columns * out >= positions  # inputs are fewer to rotate than gradients
    if early:
        h = _rotate(h, inputs)
    total = d.new_zeros(out, len(inputs))
    width = max(1, CHUNK // (columns * total.numel()))
    for at in range(0, rows, width):
        some = d[:, at : at + width].permute(1, 0, 3, 2).flatten(1, 2)  # (n, K · out, T)
        gradients = some @ h[at : at + width]
        if not early:
            if len(inputs) > h.shape[-1]:
                gradients = torch.cat([gradients, some.sum(-1, keepdim=True)], -1)
            gradients = gradients @ inputs
        stacked = gradients.reshape(-1, out, len(inputs))
        total += (output.T @ stacked).square_().sum(0)
    return total


def _rotate(h: Tensor, basis: Tensor) -> Tensor:
    """The product Q_Aᵀ h for h (..., in), followed by a one where the basis has a row more."""
    width = h.shape[-1]
    rotated = h @ basis[:width]
    return rotated if len(basis) == width else rotated.add_(basis[-1])
