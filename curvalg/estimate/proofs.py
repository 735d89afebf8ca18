"""Facts that must be known of an operator before something is estimated: proved, or tried where nothing can be proved."""

from __future__ import annotations

import torch

from curvalg.errors import FactsError
from curvalg.estimate.target import Target


def require_symmetric(target: Target, seed: int) -> int:
    """Raise for what a symmetric solver cannot do; returns the number of products that this took.

    Curvature operators must be proved symmetric. Others are tried on two random vectors, xᵀAy = yᵀAx.

    Raises:
        FactsError: not symmetric, or not known to be.
    """
    m, n = target.shape
    if m != n:
        raise FactsError(
            f"expected a square operator, but {target.name} is {m} x {n}; singular values are given by svds"
        )
    if target.symmetric:
        return 0
    cure = "write a symmetric expression, such as A.T @ A, or use svds for singular values"
    if target.symmetric is False:
        raise FactsError(f"expected a symmetric operator, but {target.name} is not known to be symmetric; {cure}")
    space = target.vectors
    rows = space.normals(f"symmetry {seed}", 0, 2).to(target.space.device, target.space.dtype)
    target = target.in_units()  # products of tiny numbers vanish
    images = target.multiply(rows.T).T
    inner = space.inner(rows, images)
    of_rows, of_images = space.joined(space.lengths_part(rows), space.lengths_part(images))
    allowed = torch.finfo(target.space.dtype).eps ** 0.5 * float(of_rows.max() * of_images.max())
    if abs(float(inner[0, 1] - inner[1, 0])) > allowed:
        inner = target.back(inner)
        raise FactsError(
            f"expected a symmetric operator, but for random x and y xᵀAy = {float(inner[0, 1]):.6g} and "
            f"yᵀAx = {float(inner[1, 0]):.6g} with A = {target.name}; {cure}"
        )
    return 2


def require_square(target: Target, quantity: str) -> None:
    """Raise if an operator is not square.

    Raises:
        FactsError: the operator is one.
    """
    m, n = target.shape
    if m != n:
        raise FactsError(
            f"expected a square operator for its {quantity}, but {target.name} is {m} x {n}; take that of A.T @ A or A @ A.T, "
            "or norm(A)"
        )


def require_psd(target: Target, instead: str) -> None:
    """Raise for curvature operators that are not proved positive semi-definite.

    Raises:
        FactsError: it is not proved.
    """
    if target.psd is False:
        raise FactsError(
            f"expected a positive semi-definite operator, but the fact psd is not proved for {target.name}; {instead}"
        )


def require_definite(given: Target, name: str, *, strictly: bool) -> None:
    """Raise for curvature operators that are not proved positive (semi)definite.

    Raises:
        FactsError: not proved.
    """
    if given.operator is None:
        return
    facts = given.operator.facts
    if strictly and not facts.positive_definite:
        cure = (
            "add damping, + c * Identity with c > 0"
            if facts.psd
            else "take a positive semidefinite term, such as ggn or fisher, and add damping, + c * Identity"
        )
        raise FactsError(f"{name} needs a positive definite operator, but {given.name} is not known to be; {cure}")
    if not strictly and not facts.psd:
        raise FactsError(
            f"{name} needs a positive semidefinite operator, but {given.name} is not known to be; take a term that is, such "
            "as ggn or fisher, or a loss that is convex in the outputs"
        )
