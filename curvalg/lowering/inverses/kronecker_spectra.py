"""Eigendecompositions of Kronecker factors, dealt out to the processes that share a problem."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from curvalg.expr import Kronecker
from curvalg.lowering.matrices.array_leaves import rounding, tensor
from curvalg.problem import Problem, Snapshot
from curvalg.solve import NOISE, eigenpairs

Spectrum: TypeAlias = "list[tuple[Tensor, Tensor]]"
"""Eigenvalues and eigenvectors of each factor."""
Spectra: TypeAlias = "tuple[tuple[Problem, Kronecker, Tensor], ...]"
"""Kronecker products, each with the problem that keeps its spectrum and a tensor like what it is computed in."""


def spectrum(problem: Problem, snapshot: Snapshot, leaf: Kronecker, like: Tensor) -> Spectrum:
    """The eigenpairs of the factors of a Kronecker product, kept on the problem."""
    return problem.cached(snapshot).get("eigenpairs", leaf, lambda: _decomposed(leaf, like), budgeted=True)


def eigenvalues(leaf: Kronecker, pairs: Spectrum) -> Tensor:
    """The eigenvalues (..., n) of a Kronecker product, from the eigenpairs of its factors.

    Those of a factor that are no larger than the rounding errors of its entries are zero. Of a factor in float32 that has no
    inverse they are some 1e-7 of the largest, of either sign: times the largest of another factor that is more than many a
    damping. Of diagonal factors every eigenvalue is exact.
    """
    values = pairs[0][0].new_ones(*pairs[0][0].shape[:-1], 1)
    for factor, (own, _) in zip(leaf.factors, pairs, strict=True):
        known = own
        if own.numel() and not _is_diagonal(tensor(factor, own)):
            sizes = own.abs()
            known = own.masked_fill(sizes <= NOISE * rounding(factor) * sizes.amax(-1, keepdim=True), 0.0)
        values = (values[..., :, None] * known[..., None, :]).flatten(-2)
    return values


def _is_diagonal(factor: Tensor) -> bool:
    return not bool((factor - torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1))).any())


def decompose_together(wanted: Spectra, snapshot: Snapshot) -> None:
    """Find the spectra of many products, each factor on one of the processes; nothing where there is one process."""
    if not wanted or (group := wanted[0][0].group).alone:
        return
    places = {(id(problem), leaf): (problem, leaf, like) for problem, leaf, like in wanted}
    known = all(problem.cached(snapshot).found("eigenpairs", leaf) is not None for problem, leaf, _ in places.values())
    if group.every(known):
        return
    sizes = [(place, number) for place, (_, leaf, _) in places.items() for number in range(len(leaf.factors))]
    tasks = [partial(_pair, *places[place][1:], number) for place, number in sizes]
    made = iter(group.dealt(tasks, list(_costs(leaf for _, leaf, _ in places.values()))))
    for problem, leaf, _ in places.values():
        pairs = [next(made) for _ in leaf.factors]
        problem.cached(snapshot).get("eigenpairs", leaf, lambda pairs=pairs: pairs, budgeted=True)  # type: ignore[misc]


def _decomposed(leaf: Kronecker, like: Tensor) -> Spectrum:
    return [_pair(leaf, like, number) for number in range(len(leaf.factors))]


def _pair(leaf: Kronecker, like: Tensor, number: int) -> tuple[Tensor, Tensor]:
    factor = tensor(leaf.factors[number], like)
    return eigenpairs((factor + factor.mT) / 2)


def _costs(leaves: Iterable[Kronecker]) -> Iterable[float]:
    for leaf in leaves:
        yield from (float(factor.shape[-1]) ** 3 * (leaf.count or 1) for factor in leaf.factors)
