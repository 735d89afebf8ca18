"""The spectral density of a symmetric operator."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from curvalg.distributed.group import shared_call
from curvalg.estimate.proofs import require_symmetric
from curvalg.estimate.request import (
    Request,
    require_count,
    require_grid,
    require_one_of,
    require_outliers,
    require_positive,
)
from curvalg.estimate.result import Result
from curvalg.estimate.sampling.slq import StochasticLanczos
from curvalg.estimate.spectra.curve import Density, Look
from curvalg.estimate.spectra.eigen import confined, eigsh
from curvalg.estimate.spectra.smooth import SCALES
from curvalg.estimate.target import CHEAP, Basis, Target, target
from curvalg.lowering.matrices import Eigh
from curvalg.runs.run import run
from curvalg.runs.run_file import FileName
from curvalg.solve.orthogonal import orthonormalise
from curvalg.solve.quadrature import GaussRules
from curvalg.tensors.memory import small

Scale = Literal["linear", "log"]


@shared_call
def spectral_density(
    op: Any,
    *,
    probes: int = 10,
    steps: int = 50,
    scale: Scale = "linear",
    outliers: int = 0,
    grid: int | Tensor = 1024,
    width: float | None = None,
    seed: int = 0,
    basis: Basis = "device",
    checkpoint: FileName | None = None,
    progress: bool = False,
) -> Density:
    """The density of the eigenvalues of a symmetric operator, by stochastic Lanczos quadrature.

    φ(λ) = k⁻¹ Σ_probes Σ_j τ_j² N(λ; θ_j, σ²), with the Ritz values θ and squared first components τ² of Lanczos recurrences
    of k random vectors, which are all advanced by one product. On a logarithmic scale it is the density of
    log₁₀(|λ| + floor), the floor 1e-5 of the largest |λ|, with the share of negative eigenvalues beside it. Where the
    structure of a curvature operator gives all its eigenvalues at no greater cost, they are exact.

    Vectors are re-orthogonalised as long as all bases take at most 2²⁷ numbers; beyond, ``method`` says so.

    Args:
        op: a :class:`~curvalg.CurvatureOperator` that is proved symmetric, another SciPy ``LinearOperator`` or a matrix.
        probes: random vectors k; error bars need at least two.
        steps: products with each of them; at most n are made.
        scale: "linear" or "log".
        outliers: so many eigenvalues of largest magnitude are computed by :func:`eigsh`, removed from the probes, and put
            back as peaks of weight 1/n.
        grid: number of points (more where bumps or outliers need them), or the points (g,): eigenvalues, or |λ| + floor.
        width: σ of the bumps in units of the axis (decades on a log scale); by default Papyan's rule,
            σ = 2 / ((M − 1) √(8 ln κ)) times half the range for M steps and κ = 3 (1.04 on a log scale).
        seed: of the probes.
        basis: where the Krylov vectors lie: on the "device" of the operator or, where they do not fit there, in the memory of
            the "cpu", which they leave for products only.
        checkpoint: a file that the run is written to and resumed from; the search for outliers has one beside it, named
            with ".outliers" at the end.
        progress: show products done and expected.

    Returns:
        Density: it integrates to 1; error bands are one standard error over the probes. After Ctrl-C it is that of the last
        complete step, ``partial=True``.

    Raises:
        FactsError: the operator is not symmetric, or not proved to be.
        ExpressionError: an argument that makes no sense.
        ProblemError: a product that is not finite.
        CheckpointError: the file is of another run, or damaged.
        ConvergenceError: outliers that were not found.

    Sources: Ubaru, Chen and Saad (SIAM J. Matrix Anal. Appl. 2017); Ghorbani, Krishnan and Xiao (arXiv 1901.10159); Papyan
    (arXiv 2008.11865).

    >>> import torch
    >>> density = spectral_density(torch.diag(torch.linspace(-1, 1, 50)), steps=20)
    >>> round(float(torch.trapezoid(density.density, density.grid)), 4)
    1.0
    >>> half = density.count(0, 1)
    >>> abs(half.value - 25) < 4 * half.error
    True
    """
    begin, given = time.perf_counter(), target(op, basis).in_units()
    request = Request(seed, checkpoint, progress)
    probes, steps = require_count(probes, "probes"), require_count(steps, "steps")
    require_one_of(scale, "scale", SCALES)
    require_grid(grid, scale)
    if width is not None:
        width = require_positive(width, "a width > 0, or None")
    outliers = require_outliers(outliers, given.size)
    file = given.checkpoint(checkpoint)
    before = require_symmetric(given, request.seed)
    look = Look(scale, grid, width, steps)
    if (known := _exact(given, outliers, probes * steps)) is not None:
        return Density.of(*known, look, given.size, _made("exact", 0, time.perf_counter() - begin))
    peaks, locked = torch.zeros(0, dtype=torch.float64, device="cpu"), given.rows(None, "outliers")
    if outliers:
        path = None if checkpoint is None else Path(checkpoint).with_name(f"{Path(checkpoint).name}.outliers")
        pairs = eigsh(op, outliers, which="LM", seed=seed, basis=basis, checkpoint=path, progress=progress)
        if pairs.partial:
            raise KeyboardInterrupt
        before, peaks = before + pairs.products, pairs.eigenvalues
        rows = pairs.eigenvectors.T.contiguous()
        locked = orthonormalise(rows, rows[:0], 1.0, space=given.vectors)[0]
    algorithm = StochasticLanczos(
        target=confined(given, locked),
        probes=probes,
        steps=min(steps, given.size - len(locked)),
        seed=int(seed),
        name="spectral_density",
        locked=locked,
        before=before,
    )
    outcome = run(algorithm, checkpoint=file, progress=progress, expected=given.expected)
    seconds = max(outcome.seconds, time.perf_counter() - begin)
    made = _made(algorithm.method, outcome.state.products, seconds, outcome.partial)
    return Density.of(algorithm.result(outcome), peaks, look, given.size, made)


def _made(method: str, products: int, seconds: float, partial: bool = False) -> Result:
    return Result(method=method, products=products, seconds=seconds, converged=not partial, partial=partial)


def _exact(given: Target, outliers: int, products: int) -> tuple[GaussRules, Tensor] | None:
    """All eigenvalues as one rule and the outliers, where structure gives them for no more than so many products."""
    if (known := given.structured("eigh", max(CHEAP, products))) is None:
        return None
    pairs: Eigh = known[0]
    repeated = min(pairs.multiplicity, outliers)
    listed = small(pairs.eigenvalues)
    values = torch.cat([listed, listed.new_full((repeated + 1,), pairs.rest)])
    counts = torch.ones_like(values)
    counts[-1] = pairs.multiplicity - repeated
    order = values[:-1].abs().argsort(descending=True, stable=True)
    peaks, counts[order[:outliers]] = values[order[:outliers]], 0.0
    left = float(counts.sum())
    rule = GaussRules(values[None], counts[None] / left, (values[None], counts[None] / left))
    return rule, peaks.sort().values
