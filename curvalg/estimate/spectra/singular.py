"""A few singular triplets of a rectangular operator."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvalg.distributed.group import shared_call
from curvalg.estimate.request import OnFail, Request, require_pairs
from curvalg.estimate.result import Eigenpairs, Result, axes, short, whole_numbers
from curvalg.estimate.spectra.eigen import search
from curvalg.estimate.spectra.eigenpair_search import Block
from curvalg.estimate.target import Basis, Target, target
from curvalg.lowering.vectors import Vector
from curvalg.runs.run_file import FileName
from curvalg.solve.orthogonal import complete, orthonormalise
from curvalg.tensors.memory import small


@dataclass(frozen=True, kw_only=True, repr=False)
class SingularTriplets(Result):
    """Singular values with vectors; ``U, s, V = triplets`` takes them apart, A ≈ U diag(s) Vᵀ.

    Args:
        left: orthonormal columns u, (m, k).
        values: ascending, as eigenvalues are, float64, shape (k,).
        right: orthonormal columns v, (n, k).
        residuals: the root of ‖A v − s u‖² + ‖Aᵀ u − s v‖² of each, recomputed from products, (k,).
    """

    left: Tensor
    values: Tensor
    right: Tensor
    residuals: Tensor

    @property
    def findings(self) -> dict[str, str]:
        most = float(self.residuals.max()) if len(self.residuals) else 0.0
        return {"singular values": short(self.values), "residuals": f"≤ {most:.1g}"}

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.left, self.values, self.right))

    def plot(self, ax: Any = None) -> Any:
        """Draw the singular values, falling."""
        ax = axes(ax)
        ax.semilogy(range(1, len(self.values) + 1), self.values.flip(0).numpy(), "o")
        ax.set_xlabel("rank")
        ax.set_ylabel("singular value")
        whole_numbers(ax)
        return ax


@shared_call
def svds(
    op: Any,
    k: int = 6,
    *,
    tol: float | None = None,
    block: Block = "auto",
    v0: Vector | None = None,
    seed: int = 0,
    maxiter: int | None = None,
    on_fail: OnFail = "raise",
    basis: Basis = "device",
    checkpoint: FileName | None = None,
    progress: bool = False,
) -> SingularTriplets:
    """The k largest singular values of an operator, such as ``jacobian``, with their vectors.

    By :func:`eigsh` (Golub and Underwood, 1977) of AᵀA or A Aᵀ, whichever is smaller: ‖AᵀA v − s² v‖ ≤ tol · s_max², so that a
    singular value s has an error of at most tol · s_max² / s, and those below the root of the rounding unit times s_max (3e-4
    s_max in float32, 1.5e-8 s_max in float64) are noise.

    Args:
        op: a :class:`~curvalg.CurvatureOperator`, another SciPy ``LinearOperator`` or a matrix, of shape (m, n).
        k: how many, 1 ≤ k ≤ min(m, n).
        tol: as above.
        block, seed, maxiter, on_fail, basis, checkpoint, progress: as of :func:`eigsh`; each product there is two here.
        v0: vector(s) to start from, of length min(m, n).

    Returns:
        Singular triplets, values ascending.

    Raises:
        ConvergenceError: the tolerance was not reached; the triplets as they are then are in ``error.result``.
        ExpressionError: an argument that makes no sense.

    >>> import torch
    >>> U, s, V = svds(torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), 2)
    >>> s.round(decimals=4)
    tensor([2., 3.], dtype=torch.float64)
    """
    request = Request(seed, checkpoint, progress, on_fail, tol, exactness=True, maxiter=maxiter)
    begin, given = time.perf_counter(), target(op, basis).in_units()
    k = require_pairs(k, min(given.shape), f"{given.name} of shape {given.shape}")
    pairs, complaint = search(gram(given), k, "LA", request, block=block, v0=v0)
    made = _triplets(given, pairs)
    triplets = dataclasses.replace(
        made,
        values=given.back(made.values),
        residuals=given.back(made.residuals),
        seconds=max(pairs.seconds, time.perf_counter() - begin),
    )
    if complaint:
        request.fail(complaint, triplets)
    return triplets


def gram(given: Target) -> Target:
    """The smaller one of AᵀA and A Aᵀ; of a target with a unit in the square of it."""
    m, n = given.shape
    first, second = (given.multiply, given.adjoint) if n <= m else (given.adjoint, given.multiply)

    def multiply(x: Tensor) -> Tensor:
        return second(first(x))

    size = min(m, n)
    vectors = given.vectors if n <= m else given.images
    space = dataclasses.replace(given.space, size=size, layout=given.layout if n <= m else None, sharded=vectors)
    name = f"AᵀA of A = {given.name}" if n <= m else f"A Aᵀ of A = {given.name}"
    return dataclasses.replace(
        given,
        name=name,
        shape=(size, size),
        space=space,
        multiply=multiply,
        adjoint=multiply,
        symmetric=True,
        subject=lambda: {**given.subject(), "matrix": "AᵀA" if n <= m else "AAᵀ"},
        operator=None,
        codomain=vectors,
    )


def _triplets(given: Target, pairs: Eigenpairs) -> SingularTriplets:
    """The triplets, with the vectors of the other side by products with those that were found."""
    m, n = given.shape
    forward, back = (given.multiply, given.adjoint) if n <= m else (given.adjoint, given.multiply)
    found, values = pairs.eigenvectors, pairs.eigenvalues.clamp_min(0).sqrt()
    images = forward(found)
    # Images of noise have no direction of their own: any orthonormal ones are as good.
    clear = values > torch.finfo(found.dtype).eps ** 0.5 * values.max()
    spaces = (given.images, given.vectors) if n <= m else (given.vectors, given.images)
    space, rows = spaces[0], images.T[:0]
    if bool(clear.any()):
        rows = orthonormalise(images[:, clear].T, rows, 0.0, space=space)[0]
    # Orthonormal, and as near to the images as can be: the polar factor undoes the rotation.
    u, _, vh = torch.linalg.svd(small(space.gram(rows, (images[:, clear] / values[clear].to(images)).T)))
    others = complete(rows, len(values) - len(rows), "singular vectors", space=space)
    other = images.new_empty(len(images), len(values))
    other[:, clear] = rows.T @ (u @ vh).to(rows)
    other[:, ~clear] = others.T
    s = values.to(found)
    residuals = small(torch.hypot(space.norms(images - other * s), spaces[1].norms(back(other) - found * s)))
    left, right = (other, found) if n <= m else (found, other)
    account = {**pairs.account, "method": "lanczos", "products": 2 * pairs.products + 2 * len(values)}
    return SingularTriplets(**account, left=left, values=values, right=right, residuals=residuals)
