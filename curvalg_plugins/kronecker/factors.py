"""Kronecker factors of one layer from its inputs h and output deltas δ, summed over the data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from curvalg import Batch, FactorPairs, LayerRecord
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
        yield list(batch.layers(few_columns(batch, fisher, samples, seed), independent=fisher == "mc"))
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
    several = "two" if passes == 2 else f"at most {passes}"
    twice = f", in each of {several} passes over the data" if passes > 1 else ""
    others = ", ".join(f"fisher={kind!r} takes {count:,}" for kind, count in counts.items() if kind != fisher)
    return f"{label}: {what}, {counts[fisher]:,} for each row, a backward pass over a batch for each{twice}; {others}"


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


def _counted(
    h: Tensor, active: Tensor | None, approximation: Approximation, real: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The vectors that an input factor is made of (rows, positions, in), and which of them count (None: all)."""
    if active is not None:
        # Rows of the output may be computed together, as tokens of a sequence: then a row of inputs counts with any of them.
        active = active.unflatten(0, (len(h), -1)).any(1)
        h, real = h[active], None if real is None else real[active]
    if approximation == "expand" or not h.shape[1]:
        return h, real
    if real is None:
        return h.mean(1, keepdim=True), None
    some = real.sum(1)
    return h.sum(1, keepdim=True) / some.clamp_min(1)[:, None, None], (some > 0)[:, None]


def input_factor(
    h: Tensor, active: Tensor | None, approximation: Approximation, bias: bool, real: Tensor | None = None
) -> tuple[Tensor, float]:
    """The sum Σ h hᵀ over active rows (None: all), and the number of summands, for h (n, T, in).

    With a bias of h followed by a one. Positions that are not ``real`` (None: all are) hold zeros and do not count.
    """
    h, real = _counted(h, active, approximation, real)
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


def input_factors(
    pair: FactorPairs, active: Tensor | None, approximation: Approximation, joint: bool
) -> tuple[Tensor, Tensor]:
    """The sums Σ h hᵀ of each group (groups, in, in), and the numbers of summands (groups,).

    With a bias, if ``joint``, of h followed by a one.
    """
    bias = joint and pair.bias is not None
    found = [input_factor(h, active, approximation, bias, r) for h, r in zip(pair.inputs, reals(pair), strict=True)]
    return torch.stack([factor for factor, _ in found]), pair.inputs.new_tensor([count for _, count in found])


def reals(pair: FactorPairs) -> list[Tensor | None]:
    """The positions of each group that are inputs, None for all."""
    return [None] * len(pair.inputs) if pair.real is None else list(pair.real)


def output_factors(deltas: Tensor, approximation: Approximation) -> Tensor:
    """The sums Σ δ δᵀ of each group (groups, out, out) for δ (groups, K, n, T, out)."""
    return torch.stack([output_factor(d, approximation) for d in deltas])


def apart(orders: list[Tensor | None], size: int) -> bool:
    """Whether parts are different numbers; None stands for all."""
    if any(order is None for order in orders):
        return len(orders) == 1
    found = torch.cat([order for order in orders if order is not None])
    return len(found) <= size and len(found.unique()) == len(found)


def completed(orders: list[Tensor], size: int) -> Tensor | None:
    """The numbers of several parts one after the other, and then those that are in none; None where they are in order."""
    found = torch.cat(orders)
    missing = torch.ones(size, dtype=torch.bool, device=found.device)
    missing[found] = False
    order = torch.cat([found, missing.nonzero()[:, 0]])
    return None if bool((order[1:] > order[:-1]).all()) else order


def extended(stacks: list[Tensor], missing: int, *, unit: bool = False) -> Tensor:
    """Stacks (groups, n, m) one after the other, and as many zeros or unit matrices."""
    like = stacks[0]
    more = units(missing, like.shape[-1], like) if unit else like.new_zeros(missing, *like.shape[1:])
    return torch.cat([*stacks, more])


def side_by_side(parts: list[Tensor]) -> Tensor:
    """Matrices (rows, n) beside each other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def units(groups: int, size: int, like: Tensor) -> Tensor:
    """Unit matrices (groups, size, size)."""
    return torch.eye(size, dtype=like.dtype, device=like.device).repeat(groups, 1, 1)


def damped(factors: Tensor, damping: float | Tensor) -> Tensor:
    """The matrices F + c I for a stack (groups, n, n), one c or one for each."""
    return factors + damping * torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)


def split_damping(output: Tensor, inputs: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Factors (B + √c/π I, A + π√c I) with π² = (tr A / dim A) / (tr B / dim B): Martens and Grosse, arXiv 1503.05671, §6.3.

    Args:
        output: B (groups, out, out).
        inputs: A (groups, in, in).
        damping: c.
    """
    a, b = (f.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] for f in (inputs, output))
    pi = torch.where((a > 0) & (b > 0), a / b, torch.ones_like(a)).sqrt()
    root = math.sqrt(damping)
    return damped(output, root / pi), damped(inputs, pi * root)


def eigenvectors(matrix: Tensor, double: bool = False) -> Tensor:
    """The eigenvectors of symmetric matrices (groups, n, n), in their own precision.

    Diagonal ones, as of the inputs of a table, have unit vectors, which are not computed.

    Args:
        matrix: a stack.
        double: find them in float64; so they are, on the CPU, where their own precision does not converge.
    """
    if is_diagonal(matrix):
        return units(len(matrix), matrix.shape[-1], matrix)
    if not double:
        try:
            vectors: Tensor = torch.linalg.eigh(matrix)[1]
            if bool(torch.isfinite(vectors).all()):
                return vectors
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            pass
    # Of other devices some have no float64.
    own = matrix if double and matrix.device.type in ("cpu", "cuda") else matrix.cpu()
    found: Tensor = torch.linalg.eigh(own.double())[1]
    return found.to(matrix)


def is_diagonal(matrices: Tensor) -> bool:
    """Whether finite matrices (groups, n, n) have nothing beside their diagonals."""
    return bool(
        (matrices.count_nonzero() == matrices.diagonal(dim1=1, dim2=2).count_nonzero()) & matrices.isfinite().all()
    )


CHUNK = 2**22
"""Numbers in the gradients that are held at a time."""


def group_moments(pair: FactorPairs, output: Tensor, inputs: Tensor | None) -> Tensor:
    """The :func:`second_moments` of each group (groups, out, in), in bases (groups, n, n)."""
    bases = [None] * len(pair.inputs) if inputs is None else list(inputs)
    parts = zip(pair.inputs, pair.deltas, output, bases, strict=True)
    return torch.stack([second_moments(h, d, q_b, q_a) for h, d, q_b, q_a in parts])


def bias_moments(pair: FactorPairs, output: Tensor) -> Tensor:
    """Second moments Σ_kn [(Q_Bᵀ Σ_t δ)_i]² of each group (groups, out, 1)."""
    return (pair.deltas.sum(3) @ output[:, None]).square().sum((1, 2))[..., None]


def second_moments(h: Tensor, d: Tensor, output: Tensor, inputs: Tensor | None) -> Tensor:
    """Second moments Σ_kn [(Q_Bᵀ dW Q_A)_ij]² with dW = Σ_t δ hᵀ, shape (out, in).

    Each side is rotated before they are multiplied or after, whichever has fewer numbers.

    Args:
        h: (n, T, in), followed by a one where Q_A has a row more.
        d: δ (K, n, T, out).
        output: Q_B.
        inputs: Q_A; None: unit vectors.
    """
    columns, rows, positions, out = d.shape
    if positions == 1:
        return (d[:, :, 0] @ output).square().sum(0).T @ _rotate(h[:, 0], inputs).square()
    width = h.shape[-1] if inputs is None else len(inputs)
    early = columns * out >= positions  # inputs are fewer to rotate than gradients
    if early:
        h = _rotate(h, inputs)
    if deltas_early := width >= positions:
        d = d @ output
    total = d.new_zeros(out, width)
    step = max(1, CHUNK // (columns * total.numel()))
    for at in range(0, rows, step):
        some = d[:, at : at + step].permute(1, 0, 3, 2).flatten(1, 2)  # (n, K · out, T)
        gradients = some @ h[at : at + step]
        if not early and inputs is not None:
            if width > h.shape[-1]:
                gradients = torch.cat([gradients, some.sum(-1, keepdim=True)], -1)
            gradients = gradients @ inputs
        stacked = gradients.reshape(-1, out, width)
        total += (stacked if deltas_early else output.T @ stacked).square_().sum(0)
    return total


def _rotate(h: Tensor, basis: Tensor | None) -> Tensor:
    """The product Q_Aᵀ h for h (..., in), followed by a one where the basis has a row more."""
    if basis is None:
        return h
    width = h.shape[-1]
    rotated = h @ basis[:width]
    return rotated if len(basis) == width else rotated.add_(basis[-1])
