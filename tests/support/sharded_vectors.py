"""Estimators and solvers on vectors that are cut over processes, beside the same on whole vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from curvalg.estimate import (
    diagonal,
    effective_dimension,
    eigsh,
    logdet,
    matrix_function,
    norm,
    spectral_density,
    svds,
    trace,
)
from curvalg.estimate.target import Target, target
from curvalg.solve import cg, minres, quadrature, search
from curvalg.tensors.spaces import ShardedSpace, VectorSpace

F64 = torch.float64
Pieces = list[tuple[int, int]]


class AllReduce:
    """Exchanges of the processes of a group, counted."""

    def __init__(self, group: Any) -> None:
        self.group, self.exchanges = group, 0

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, torch.distributed.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, torch.distributed.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        self.exchanges += 1
        found = tensor.clone()
        torch.distributed.all_reduce(found, op=how, group=self.group)
        return found


class Twin:
    """Exchanges with a process that holds the very same numbers, counted."""

    def __init__(self) -> None:
        self.exchanges = 0

    def sum(self, tensor: Tensor) -> Tensor:
        self.exchanges += 1
        return 2 * tensor

    def largest(self, tensor: Tensor) -> Tensor:
        self.exchanges += 1
        return tensor.clone()


def twin(size: int, exchanger: Twin) -> ShardedSpace:
    """The space of vectors that two processes hold whole, seen from one of them."""
    return ShardedSpace(size, [(0, size)], exchanger, torch.full((size,), 0.5, dtype=F64))


def uneven(size: int, rank: int, world: int) -> Pieces:
    """Three numbers on the first process, none on the third, the rest on the second."""
    return [[(0, 3)], [(3, size - 3)], []][rank]


def interleaved(size: int, rank: int, world: int) -> Pieces:
    """Runs of five dealt out in turns, those of one process in falling order."""
    return [(at, min(5, size - at)) for at in range(5 * rank, size, 5 * world)][::-1]


def replicated(size: int, rank: int, world: int) -> Pieces:
    """The first seven numbers on all processes, the last two on the first and the last one, the rest once."""
    first, last = 7 + (size - 9) * rank // world, 7 + (size - 9) * (rank + 1) // world
    ends = [(size - 2, 2)] if rank in (0, world - 1) else []
    return [*ends, (first, last - first), (0, 7)]


CUTS: dict[str, Callable[[int, int, int], Pieces]] = {c.__name__: c for c in (uneven, interleaved, replicated)}


@dataclass(frozen=True)
class Whole:
    """Vectors of one process.

    Args:
        size: of them.
    """

    size: int

    @property
    def space(self) -> VectorSpace:
        return VectorSpace(self.size)

    def cut(self, vectors: Tensor) -> Tensor:
        """What this process holds of whole columns."""
        return vectors

    def whole(self, parts: Tensor) -> Tensor:
        """Whole columns from what the processes hold."""
        return parts


class Cut:
    """Vectors that are cut over the processes of a group."""

    def __init__(self, group: Any, cut: str, size: int) -> None:
        rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        every = [CUTS[cut](size, r, world) for r in range(world)]
        held = torch.zeros(size, dtype=F64)
        for place, length in (piece for pieces in every for piece in pieces):
            held[place : place + length] += 1
        assert bool((held > 0).all())
        places = [torch.arange(place, place + length) for place, length in every[rank]]
        self.places, self.size = torch.cat([*places, torch.zeros(0, dtype=torch.int64)]), size
        weights = None if bool((held == 1).all()) else 1 / held[self.places]
        self.weights = torch.ones(len(self.places), dtype=F64) if weights is None else weights
        self.exchanger, self.of_products = AllReduce(group), AllReduce(group)
        self.space = ShardedSpace(size, every[rank], self.exchanger, weights)

    def cut(self, vectors: Tensor) -> Tensor:
        return vectors[self.places]

    def whole(self, parts: Tensor) -> Tensor:
        columns = parts if parts.ndim > 1 else parts[:, None]
        found = torch.zeros(self.size, columns.shape[1], dtype=F64)
        found.index_add_(0, self.places, columns.double() * self.weights[:, None])
        return self.of_products.sum(found).reshape(self.size, *parts.shape[1:])


class Doubled:
    """Vectors that this process holds twice, and a second one just as well: sums without weights, without the other process, or
    without both are all wrong."""

    def __init__(self, size: int) -> None:
        pieces, weights = [(0, size), (0, size)], torch.full((2 * size,), 0.25, dtype=F64)
        self.size, self.space = size, ShardedSpace(size, pieces, Twin(), weights)

    def cut(self, vectors: Tensor) -> Tensor:
        return torch.cat([vectors, vectors])

    def whole(self, parts: Tensor) -> Tensor:
        return parts[: self.size]


Vectors: TypeAlias = Whole | Cut | Doubled


def operator(vectors: Vectors, matrix: Tensor, *, psd: bool | None = None) -> Target:
    """A symmetric matrix as an operator on such vectors, and how often it was multiplied with a vector."""
    made = target(matrix)

    def multiply(x: Tensor) -> Tensor:
        return vectors.cut(matrix @ vectors.whole(x).to(matrix.dtype))

    space = vectors.space
    return replace(
        made,
        space=replace(made.space, sharded=None if space.whole else space),
        multiply=multiply,
        adjoint=multiply,
        codomain=space,
        symmetric=True,
        psd=psd,
    )


def basis(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64)).Q


def spectrum(values: Tensor, seed: int = 0) -> Tensor:
    Q = basis(len(values), seed)
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


n = 70
SIGNED = spectrum(torch.cat([torch.tensor([-6.0, 9, 7, 7, 7, 5, 4]), torch.linspace(-2.9, 2.7, n - 7)]).double())
DEFINITE = spectrum(torch.logspace(-1, 1, n, dtype=F64), 1)
INDEFINITE = spectrum(torch.cat([torch.linspace(-3, -1, n // 2), torch.linspace(2, 4, n - n // 2)]).double(), 7)
WELL = spectrum(torch.linspace(1, 8, n, dtype=F64), 8)
APART = spectrum(torch.cat([torch.tensor([200.0, -100]), torch.linspace(-1, 1, n - 2)]).double(), 9)
DECAYING = spectrum(0.8 ** torch.arange(n, dtype=F64), 2)
SMALL = spectrum(torch.tensor([3.0, 3, 3, 2, 1, 0, 0, -1, -2, -5, 4, 1]).double(), 3)
Results = dict[str, Any]
Case = Callable[[Vectors], Results]


def _pairs(found: Any, vectors: Vectors) -> Results:
    whole = vectors.whole(found.eigenvectors)
    return {"values": found.eigenvalues, "projector": whole @ whole.T, "products": found.products}


def _eigen(matrix: Tensor, k: int, **options: Any) -> Case:
    def case(vectors: Vectors) -> Results:
        given = dict(options)
        for name in ("v0", "deflate"):
            if name in given:
                given[name] = vectors.cut(given[name])
        return _pairs(eigsh(operator(vectors, matrix), k, **{"tol": 1e-10, "block": 2, **given}), vectors)

    return case


def _restarted(vectors: Vectors) -> Results:
    """A search in less memory than it would like."""
    aim, none = search.Aim(3, "LM", 1e-9, 2, 14, 0), torch.zeros(0, vectors.space.local, dtype=F64)
    state, steps = search.start(aim, none, none, space=vectors.space), 0
    while not state.over:
        state, steps = search.step(state, aim, operator(vectors, APART).multiply), steps + 1
    return {"values": state.values, "steps": steps, "phase": state.phase}


def _measured_block(vectors: Vectors) -> Results:
    found = eigsh(operator(vectors, SIGNED), 3, which="LM", tol=1e-10)  # how many products depends on a clock
    return {"values": found.eigenvalues}


def _estimate(function: Any, matrix: Tensor, *args: Any, psd: bool | None = None, **options: Any) -> Case:
    def case(vectors: Vectors) -> Results:
        found = function(operator(vectors, matrix, psd=psd), *args, **options)
        value, error = (
            vectors.whole(x) if isinstance(x, Tensor) else torch.tensor(x) for x in (found.value, found.error)
        )
        return {"value": value, "error": error, "products": found.products, "method": found.method}

    return case


def _last_resort(vectors: Vectors) -> Results:
    """More products than a sample takes: exact, between processes by unit vectors alone."""
    found = trace(operator(vectors, SIGNED), products=20, tol=1e-9, method="xtrace", maxiter=10 * n)
    assert found.method == "exact"
    return {"value": torch.tensor(found.value)}


def _density(matrix: Tensor, **options: Any) -> Case:
    def case(vectors: Vectors) -> Results:
        found = spectral_density(operator(vectors, matrix), probes=3, **options)
        if len(found.outliers):  # how they are searched for depends on a clock, and their vectors have a tolerance
            return {"nodes, roughly": found.nodes, "outliers": found.outliers}
        return {"nodes": found.nodes, "density": found.density, "products": found.products}

    return case


def _singular(vectors: Vectors) -> Results:
    found = svds(operator(vectors, SMALL), 12, tol=1e-10, block=2)
    left, right = vectors.whole(found.left), vectors.whole(found.right)
    eye = torch.eye(12, dtype=F64)
    assert float(((left * found.values) @ right.T - SMALL).abs().max()) < 1e-6  # singular values of zero are √ε
    return {
        "values": found.values[2:],
        "orthonormal": torch.stack([left.T @ left - eye, right.T @ right - eye]),
        "products": found.products,
    }


def _function(vectors: Vectors) -> Results:
    X = torch.stack([basis(n, 4)[0], torch.zeros(n), 1e3 * basis(n, 4)[1]], 1)
    found = matrix_function(operator(vectors, DEFINITE), "sqrt", vectors.cut(X))
    return {"value": vectors.whole(found.value), "changes": found.changes, "products": found.products}


def _recurrences(whole: bool) -> Case:
    def case(vectors: Vectors) -> Results:
        matmul, space = operator(vectors, SIGNED).multiply, vectors.space
        rows = vectors.cut(basis(n, 5)[:, :3]).T.contiguous()
        r = quadrature.begin(rows, whole=whole, capacity=12, space=space)
        for _ in range(12):
            r = quadrature.advance(r, matmul)
        return {"alphas": r.alphas, "betas": r.betas}

    return case


B = torch.cat([basis(n, 6)[:, :3], torch.zeros(n, 1), 1e-3 * basis(n, 6)[:, 3:4]], 1)
DIAGONAL = WELL.diagonal()


def _solve(method: Any, matrix: Tensor, *, helped: bool = False, start: bool = False, **options: Any) -> Case:
    def case(vectors: Vectors) -> Results:
        columns: list[int] = []
        multiply = operator(vectors, matrix).multiply

        def product(x: Tensor) -> Tensor:
            columns.append(x.shape[1])
            return multiply(x)

        P = vectors.cut(DIAGONAL)[:, None]
        found = method(
            product,
            vectors.cut(B),
            x0=vectors.cut(B.flip(1)) if start else None,
            preconditioner=(lambda r: r / P) if helped else None,
            space=vectors.space,
            **{"rtol": 1e-9, "maxiter": 400, **options},
        )
        assert found.ok or "maxiter" in options
        return {
            "x": vectors.whole(found.x),
            "iterations": found.iterations,
            "products": len(columns),
            "reason": found.reason,
        }

    return case


CASES: dict[str, Case] = {
    "eigsh LM": _eigen(SIGNED, 8, which="LM"),
    "eigsh SA, single vectors": _eigen(SIGNED, 2, which="SA", block=1),
    "eigsh BE": _eigen(SIGNED, 8, which="BE"),
    "eigsh wide": _eigen(SIGNED, 4, which="LA", block=10),
    "eigsh deflate": _eigen(SIGNED, 4, which="LA", deflate=basis(n)[:, 1:5]),
    "eigsh v0": _eigen(SIGNED, 4, which="LA", v0=basis(n)[:, :5] @ torch.ones(5, 4).double()),
    "eigsh all": _eigen(SMALL, 12, which="LM", block=3),
    "eigsh alike": _eigen(SMALL, 9, which="LA", v0=SMALL[:, [0, 0, 1]], block=3),
    "eigsh with restarts": _restarted,
    "eigsh measured block": _measured_block,
    "density": _density(SIGNED, steps=25),
    "density beside outliers": _density(APART, steps=10, outliers=2),
    **{f"trace {m}": _estimate(trace, DECAYING, products=30, method=m, psd=True) for m in ("hutchinson", "xnystrace")},
    **{f"trace {m}": _estimate(trace, SIGNED, products=30, method=m) for m in ("hutch++", "xtrace")},
    "trace of low rank": _estimate(
        trace, spectrum(torch.cat([torch.ones(5), torch.zeros(n - 5)]).double()), products=30
    ),
    "trace exact": _estimate(trace, SIGNED, products=n),
    "trace to a tolerance": _estimate(trace, DECAYING, products=20, tol=1e-2, psd=True),
    "trace to the last resort": _last_resort,
    **{f"diagonal {m}": _estimate(diagonal, SIGNED, products=30, method=m) for m in ("xdiag", "hutchinson")},
    "diagonal exact": _estimate(diagonal, SIGNED, products=n),
    "diagonal to a tolerance": _estimate(diagonal, DECAYING, products=16, tol=0.2, method="hutchinson"),
    "logdet": _estimate(logdet, DEFINITE, products=100),
    "effective dimension": _estimate(effective_dimension, DEFINITE, damping=1.0, products=100),
    **{f"norm {m}": _estimate(norm, SIGNED, method=m) for m in ("hutchinson", "xnystrace")},
    "norm exact": _estimate(norm, SIGNED, products=n),
    "norm spectral": _estimate(norm, SIGNED, "spectral", tol=1e-8, maxiter=10_000),
    "norm nuclear": _estimate(norm, DECAYING, "nuclear", products=30, psd=True),
    "singular values": _singular,
    "function": _function,
    "recurrences": _recurrences(True),
    "three-term recurrences": _recurrences(False),
    "cg": _solve(cg, WELL),
    "cg, helped": _solve(cg, WELL, helped=True, start=True),
    "cg of an indefinite matrix": _solve(cg, SIGNED, maxiter=5),
    "cg in noise": _solve(cg, WELL, noise=1e-9, rtol=1e-13),
    "minres": _solve(minres, INDEFINITE),
    "minres, helped": _solve(minres, WELL, helped=True, start=True),
}


def on_ranks(group: Any, cut: str, name: str) -> Results:
    """The results of a case on a rank."""
    vectors = Cut(group, cut, 12 if name in ("eigsh all", "eigsh alike", "singular values") else n)
    return {**CASES[name](vectors), "exchanges": vectors.exchanger.exchanges}


def size_of(name: str) -> int:
    return 12 if name in ("eigsh all", "eigsh alike", "singular values") else n


def difference(found: Results, wanted: Results) -> str:
    """What differs between two results, "" for nothing."""
    for name, value in wanted.items():
        other = found[name]
        if isinstance(value, Tensor) and value.is_floating_point():
            least = 1.0 if name in ("orthonormal", "changes") else 1e-7 * float(wanted.get("value", value).norm())
            scale = max(least, float(value.norm()))
            off = float((other - value).norm()) if other.shape == value.shape else torch.inf
            if not off <= (1e-4 if "roughly" in name else 1e-8) * scale:
                return f"{name} is off by {off:.1e} of {scale:.1e}"
        elif not (torch.equal(other, value) if isinstance(value, Tensor) else other == value):
            return f"{name} is {other}, not {value}"
    return ""
