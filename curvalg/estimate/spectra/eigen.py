"""A few eigenpairs of a symmetric operator: exact where structure allows, by Lanczos where not."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from torch import Tensor

from curvalg.distributed.group import shared_call
from curvalg.errors import VectorError
from curvalg.estimate.proofs import require_symmetric
from curvalg.estimate.request import OnFail, Request, require_block, require_one_of, require_pairs
from curvalg.estimate.result import Eigenpairs
from curvalg.estimate.spectra.eigenpair_search import Block, Lanczos
from curvalg.estimate.spectra.exact import exact
from curvalg.estimate.target import Basis, Target, target
from curvalg.lowering.vectors import Vector
from curvalg.runs.run import run
from curvalg.runs.run_file import FileName
from curvalg.solve.ends import SIDES, Which
from curvalg.solve.orthogonal import orthonormalise
from curvalg.solve.powers import exponents, scaled
from curvalg.solve.search import CHALLENGE, DONE, STAGNATED


@shared_call
def eigsh(
    op: Any,
    k: int = 6,
    *,
    which: Which = "LM",
    tol: float | None = None,
    block: Block = "auto",
    v0: Vector | None = None,
    deflate: Vector | Eigenpairs | None = None,
    seed: int = 0,
    maxiter: int | None = None,
    on_fail: OnFail = "raise",
    basis: Basis = "device",
    checkpoint: FileName | None = None,
    progress: bool = False,
) -> Eigenpairs:
    """The k eigenpairs of a symmetric operator at one end of its spectrum, or at both.

    ‖A v − λ v‖ ≤ tol · |λ|max for each of them, by residuals that are recomputed from products. Where the structure of a
    curvature operator gives its eigenpairs at a price that pays, they are exact; otherwise they are found by thick-restart
    block Lanczos with full re-orthogonalisation (Golub and Underwood, 1977; Wu and Simon, SIAM J. Matrix Anal. Appl. 2000).
    Repeated eigenvalues are found as often as they occur: what was found is challenged by a search from random vectors
    orthogonal to it. Eigenvalues that differ by less than about tol · |λ|max may still take each other's place.

    Memory: max(2k + 4 block, 20) vectors of n numbers; more, up to 160, while all together are at most 2²⁴ numbers; and as
    many again for a moment at restarts.

    Args:
        op: a :class:`~curvalg.CurvatureOperator` that is proved symmetric, another SciPy ``LinearOperator`` or a matrix.
        k: how many, 1 ≤ k ≤ n.
        which: "LA" (largest), "SA" (smallest), "LM" (largest in magnitude) or "BE" (both ends, one more of the largest for
            odd k). Interior eigenvalues, and those near zero of a large operator, are out of reach of products alone.
        tol: relative to the largest |λ| that was seen; by default 1e-4, and 0.03 or 0.004 for models in bfloat16 or float16;
            0 for 100 units of rounding.
        block: vectors in each product; "auto" measures what they cost and chooses, so that the number of products and the last
            digits may differ from run to run; a number fixes them.
        v0: vector(s) to start from, of any kind that the operator multiplies; more than a block holds are mixed.
        deflate: vectors (n, m), or eigenpairs, to whose orthogonal complement the search is confined; products and
            residuals are projected onto it.
        seed: of random vectors.
        maxiter: the most products (of one vector); by default max(1000, 100 k).
        on_fail: "raise", or "warn" and return what there is with ``converged=False``.
        basis: where the Krylov vectors lie: on the "device" of the operator or, where they do not fit there, in the memory of
            the "cpu", which they leave for products only.
        checkpoint: a file that the run is written to now and then and resumed from, if it is there.
        progress: show products done and expected.

    Returns:
        Eigenpairs, eigenvalues ascending. After Ctrl-C they are those of the last complete step, ``partial=True``.

    Raises:
        FactsError: the operator is not symmetric, or not proved to be.
        ExpressionError: an argument that makes no sense.
        VectorError: v0 or deflate do not fit.
        ProblemError: a product that is not finite.
        CheckpointError: the file is of another run, or damaged.
        ConvergenceError: the tolerance was not reached; the pairs as they are then are in ``error.result``.

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> model, data = torch.nn.Linear(3, 1, bias=False), (torch.eye(3), torch.zeros(3, 1))
    >>> problem = Problem(model, torch.nn.MSELoss(reduction="sum"), data)
    >>> values, vectors = eigsh((3 * registry.build("ggn")).lower(problem), 2)
    >>> values, vectors.shape
    (tensor([6., 6.], dtype=torch.float64), torch.Size([3, 2]))
    """
    request = Request(seed, checkpoint, progress, on_fail, tol, exactness=True, maxiter=maxiter)
    given = target(op, basis).in_units()
    pairs, complaint = search(given, k, which, request, block=block, v0=v0, deflate=deflate)
    pairs = dataclasses.replace(pairs, eigenvalues=given.back(pairs.eigenvalues), residuals=given.back(pairs.residuals))
    if complaint:
        request.fail(complaint, pairs)
    return pairs


def search(
    given: Target,
    k: int,
    which: Which,
    request: Request,
    *,
    block: Block,
    v0: Vector | None,
    deflate: Vector | Eigenpairs | None = None,
) -> tuple[Eigenpairs, str]:
    """The pairs of a target with a unit, in that unit, and the complaint of :func:`eigsh` about them, "" for none."""
    begin = time.perf_counter()
    require_one_of(which, "which", SIDES, _HINTS.get(str(which), ""))
    k, block = require_pairs(k), require_block(block)
    file = given.checkpoint(request.checkpoint)
    before = require_symmetric(given, request.seed)
    locked = _locked(deflate, given)
    deflated = f" of which {len(locked)} are deflated" if len(locked) else ""
    k = require_pairs(k, given.size - len(locked), f"{given.size} rows{deflated}")
    start = given.rows(v0, "v0")
    tol = given.eigenvalue_tolerance(request.tol)
    if not len(locked) and (pairs := exact(given, k, which, tol)) is not None:
        return dataclasses.replace(pairs, seconds=time.perf_counter() - begin), ""
    algorithm = Lanczos(
        target=confined(given, locked),
        k=k,
        which=which,
        tol=tol,
        block=block,
        seed=int(request.seed),
        start_rows=start,
        locked=locked,
        most=max(1000, 100 * k) if request.maxiter is None else int(request.maxiter),
        before=before,
    )
    outcome = run(algorithm, checkpoint=file, progress=request.progress, expected=given.expected)
    state = outcome.state if outcome.partial else algorithm.checked(outcome.state)
    values, vectors, residuals = algorithm.pairs(state)
    phase = algorithm.phase(state)
    pairs = Eigenpairs(
        method="lanczos",
        products=state.products,
        seconds=max(outcome.seconds, time.perf_counter() - begin),
        converged=phase == DONE,
        partial=outcome.partial,
        eigenvalues=values,
        eigenvectors=vectors,
        residuals=residuals,
        layout=given.layout,
    )
    return pairs, "" if pairs.converged or pairs.partial else _complaint(pairs, algorithm, phase)


def _complaint(pairs: Eigenpairs, algorithm: Lanczos, phase: str) -> str:
    scale = float(pairs.eigenvalues.abs().max()) if len(pairs) else 0.0
    good = int((pairs.residuals <= algorithm.tol * scale).sum())
    reached = f"{good} of {algorithm.k} eigenpairs of {algorithm.target.name} reached tol={algorithm.tol:g}"
    reasons = {
        STAGNATED: "residuals no longer fall, so the tolerance is below the noise of the products: raise tol=, or use float64",
        CHALLENGE: "but the search for eigenvalues that they may have missed was cut short: raise maxiter=",
    }
    cure = reasons.get(phase, "raise maxiter= or tol=, or ask for fewer or for another end (which=)")
    return f"{reached} in {pairs.products} products; {cure}"


_HINTS = {"SM": "; eigenvalues near zero are the largest of the inverse: eigsh(inverse(A).lower(problem))"}


def _locked(deflate: Vector | Eigenpairs | None, given: Target) -> Tensor:
    """Orthonormal rows that span the deflated space."""
    vectors = deflate.eigenvectors if isinstance(deflate, Eigenpairs) else deflate
    rows = given.rows(vectors, "deflate")
    if not len(rows):
        return rows
    rows = scaled(rows, -exponents(rows.T, given.vectors)[:, None])
    lengths = given.vectors.norms(rows, 1)[:, None]
    if not bool((lengths > 0).all()):
        raise VectorError("deflate: expected vectors that are not zero, but one is; leave it out")
    return orthonormalise(rows / lengths, rows[:0], 1.0, space=given.vectors)[0]


def confined(given: Target, locked: Tensor) -> Target:
    """The operator on the orthogonal complement of some rows."""
    if not len(locked):
        return given

    def multiply(x: Tensor) -> Tensor:
        y = given.multiply(x)
        return y - locked.T @ given.vectors.gram(locked, y.T)

    return dataclasses.replace(given, multiply=multiply)
