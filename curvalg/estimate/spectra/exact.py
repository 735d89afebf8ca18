"""Eigenpairs that are exact by the structure of an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.estimate.result import Eigenpairs
from curvalg.estimate.target import CHEAP, Target
from curvalg.lowering.matrices import Eigh
from curvalg.solve.ends import Which, wanted
from curvalg.tensors.memory import small
from curvalg.tensors.random_numbers import normals

SHARE = 8
"""Rows for each pair asked for, above which Lanczos is cheaper: it takes about so many products for a pair."""


def exact(target: Target, k: int, which: Which, tol: float) -> Eigenpairs | None:
    """k eigenpairs by structure, in the unit of the target; None where there is none, or none that pays, or where its accuracy
    is not enough."""
    if (known := target.structured("eigh", max(CHEAP, SHARE * k))) is None:
        return None
    spectrum: Eigh = known[0]
    values, vectors = chosen(spectrum, k, which, target.size, target.space.dtype)
    vectors = vectors.to(target.space.device)
    products = target.multiply(vectors)  # first, for it may find the unit
    size = max(float(spectrum.eigenvalues.abs().max()) if len(spectrum.eigenvalues) else 0.0, abs(spectrum.rest))
    values, scale = target.to(values), float(target.to(values.new_tensor(size)))
    residuals = small((products - vectors * values.to(vectors)).norm(dim=0))
    if bool((residuals > tol * scale).any()):
        return None
    return Eigenpairs(
        method="exact",
        products=k,
        seconds=0.0,
        converged=True,
        partial=False,
        eigenvalues=values,
        eigenvectors=vectors,
        residuals=residuals,
        layout=target.layout,
    )


def chosen(spectrum: Eigh, k: int, which: Which, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The wanted pairs (values ascending (k,), vectors (n, k)); those of the rest are random vectors of its space."""
    listed, rest = small(spectrum.eigenvalues), min(spectrum.multiplicity, k)
    values, order = torch.cat([listed, listed.new_full((rest,), spectrum.rest)]).sort(stable=True)
    positions = wanted(values, which, k)
    places, values = order[positions], values[positions]
    own = places < len(listed)
    result = torch.empty(size, k, dtype=dtype, device=spectrum.eigenvalues.device)
    if bool(own.any()):
        result[:, own] = spectrum.vectors(places[own].to(result.device)).to(dtype)
    if not bool(own.all()):
        result[:, ~own] = _orthogonal(spectrum, result[:, ~own])
    return values, result


def _orthogonal(spectrum: Eigh, like: Tensor) -> Tensor:
    """Orthonormal columns (n, count) orthogonal to all listed eigenvectors, of which only some are held at a time."""
    columns = normals(like.shape, 0).to(like)
    for _ in range(3):
        for start in range(0, len(spectrum.eigenvalues), 64):
            some = spectrum.vectors(slice(start, start + 64)).to(like)
            columns = columns - some @ (some.T @ columns)
        columns = torch.linalg.qr(columns).Q
    return columns
