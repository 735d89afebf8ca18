"""Inner products of the gradients of single samples with random signs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from curvalg import Layout, OptionError, Problem, ProblemError
from curvalg_plugins.projections.dense_signs import DenseSigns
from curvalg_plugins.projections.hadamard_rows import HadamardRows
from curvalg_plugins.projections.kronecker_signs import KroneckerSigns

COLUMNS = 32
"""Samples of every row that are taken through the network at a time."""
Kind = Literal["dense", "srht", "kronecker"]
KINDS: dict[str, Callable[[Layout, int, int], DenseSigns | HadamardRows | KroneckerSigns]] = {
    "dense": DenseSigns,
    "srht": HadamardRows,
    "kronecker": KroneckerSigns,
}


def project_gradients(problem: Problem, dimensions: int, *, kind: Kind = "dense", seed: int = 0) -> Tensor:
    """Random projections Φₙ = ∇ℓₙ P of the gradients of the samples' own losses, (N, k).

    P (D, k) has entries ±1/√k, so that inner products are kept on average: E⟨Φₘ, Φₙ⟩ = ⟨∇ℓₘ, ∇ℓₙ⟩. P never exists as a whole,
    and is the same for every batch and on every device.

    - "dense": independent signs; the standard deviation is at most √(2/k) ‖∇ℓₘ‖ ‖∇ℓₙ‖ (Johnson and Lindenstrauss; Achlioptas,
      Journal of Computer and System Sciences 2003). Layer inputs and deltas are multiplied with 64 columns at a time, D k
      multiplications for each sample.
    - "srht": k rows of the Hadamard matrix after random signs, about as exact; D log D operations for each sample, whose
      gradient exists (Ailon and Chazelle, SIAM Journal on Computing 2009; Tropp, arXiv 1011.1595).
    - "kronecker": P ⊗ R for each weight with independent signs, a x out and b x in with a b = k: inputs and deltas are
      projected before they are multiplied, a out + b in multiplications (Choe et al., arXiv 2405.13954). The fastest, and the
      least exact: for a layer of one position the standard deviation is about √(2/a + 2/b) ‖∇ℓₘ‖ ‖∇ℓₙ‖; k with factors near √k
      is best.

    Args:
        problem: with a loss; ∇ℓₙ is that of the unweighted loss for a mean, ∇cₙ for a sum.
        dimensions: k.
        kind: of P.
        seed: of P. Problems with parameters of the same names and shapes have the same P.

    Returns:
        In the order of the data; with ``samples="position"`` the positions of a row follow each other in row-major order.

    Raises:
        OptionError: dimensions or a seed that are no such numbers; a kind that there is not; too many dimensions for "srht".
        LossError: samples have no losses of their own.
        ProblemError: samples influence each other (batch-norm in training mode), or a gradient is not finite.

    >>> import torch
    >>> from curvalg import Problem
    >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.randn(6, 3), torch.randn(6, 1)))
    >>> project_gradients(problem, 2).shape
    torch.Size([6, 2])
    """
    if not isinstance(problem, Problem):
        raise OptionError(f"project_gradients: expected a curvalg.Problem, got {type(problem).__name__}")
    for name, number, least in (("dimensions", dimensions, 1), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise OptionError(f"project_gradients: expected {name} to be an integer ≥ {least}, got {number!r}")
    if kind not in KINDS:
        raise OptionError(f"project_gradients: expected kind to be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    project = KINDS[kind](problem.layout, dimensions, seed)
    found: list[Tensor] = []
    with problem.group.together("project_gradients"), problem.batches() as batches:
        for batch in batches:
            split = batch.gradient_columns(batch.scale).split(COLUMNS)
            parts = [project(list(batch.layers(some)), some) for some in split]
            found.append(torch.cat(parts, 1).permute(2, 1, 0).reshape(-1, dimensions))
        here = torch.cat(found) if found else torch.zeros(0, dimensions, dtype=problem.dtype, device=problem.device)
        projected = problem.group.rows(here) / math.sqrt(dimensions)
    if not bool(torch.isfinite(projected).all()):
        wrong = (~torch.isfinite(projected)).any(1).nonzero()[:, 0].tolist()
        raise ProblemError(
            f"project_gradients: gradients of the samples {wrong[:5]} are not finite; look for targets, weights or outputs "
            "that are not"
        )
    return projected
