"""Spectra and traces of an MLP with 670k parameters, against SciPy on curvlinops' operators and curvlinops' own estimators.

::

    python benchmarks/spectra.py              # everything
    python benchmarks/spectra.py eigenvalues  # the ten largest, against SciPy on curvlinops' operator
    python benchmarks/spectra.py density      # 10 probes of 50 steps
    python benchmarks/spectra.py trace        # of GGN and Hessian by 60 products

Both sides take the same float32 matrix, one after the other in one process, set-up included. Eigenvalues are to the
tolerance 1e-3, and the truth is a run to 1e-5. Densities are compared by the first moments of their nodes; the bounds of the
spectrum, which curvlinops computes first, are part of its time and also given apart. Traces are by "auto" here and XTrace
there; the truth is a run by 240 products. Figures are wall-clock seconds on the machine at hand; run it with nothing beside it.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator, xtrace
from curvlinops.papyan2020traces.spectrum import LanczosApproximateSpectrumCached
from models import MODELS
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import nn

from curvalg import Problem, registry
from curvalg.estimate import Eigenpairs, Estimate, eigsh, spectral_density, trace

K, TOL = 10, 1e-3
PROBES, STEPS = 10, 50
PRODUCTS = 60


def ours(tol: float, name: str = "MLP") -> Eigenpairs:
    """On a fresh problem, nothing kept."""
    torch.manual_seed(0)
    model, (X, y) = MODELS[name]()
    problem = Problem(model, nn.CrossEntropyLoss(), (X, y))
    return eigsh(registry.build("hessian").lower(problem), K, which="LA", tol=tol)


def theirs(tol: float, name: str = "MLP") -> tuple[np.ndarray, int]:
    """Eigenvalues, ascending, and the number of products."""
    torch.manual_seed(0)
    model, (X, y) = MODELS[name]()
    params = list(model.parameters())
    plain = HessianLinearOperator(model, nn.CrossEntropyLoss(), params, [(X, y)], check_deterministic=False).to_scipy()
    products = 0

    def multiply(x: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return plain @ x.astype(np.float32)

    op = LinearOperator(plain.shape, matvec=multiply, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(plain.shape[0]).astype(np.float32)
    return np.sort(scipy_eigsh(op, K, which="LA", tol=tol, v0=start, return_eigenvectors=False)), products


def our_trace(term: str, products: int, name: str = "MLP") -> Estimate:
    """On a fresh problem, nothing kept."""
    torch.manual_seed(0)
    model, (X, y) = MODELS[name]()
    return trace(registry.build(term).lower(Problem(model, nn.CrossEntropyLoss(), (X, y))), products=products)


def their_trace(term: str, name: str = "MLP") -> float:
    """By XTrace."""
    torch.manual_seed(0)
    model, (X, y) = MODELS[name]()
    kind = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator}[term]
    params = list(model.parameters())
    return float(xtrace(kind(model, nn.CrossEntropyLoss(), params, [(X, y)], check_deterministic=False), PRODUCTS))


def traces() -> None:
    """Print both, and how far each is from the truth."""
    for term in ("ggn", "hessian"):
        (
            our_trace(term, PRODUCTS, "small MLP"),
            their_trace(term, "small MLP"),
        )  # both import parts of torch when first used
        begin = time.perf_counter()
        estimate = our_trace(term, PRODUCTS)
        own = time.perf_counter() - begin
        begin = time.perf_counter()
        other = their_trace(term)
        peer = time.perf_counter() - begin
        print(f"trace of {term}: {own:.2f} s by {estimate.method}, {peer:.2f} s by curvlinops; ratio {own / peer:.3f}")
        truth = our_trace(term, 4 * PRODUCTS)
        print(
            f"  {truth.value:.4f} +- {truth.error:.4f}; errors {estimate.value - truth.value:+.4f} (reported: "
            f"{estimate.error:.4f}) and {other - truth.value:+.4f}",
            flush=True,
        )


def eigenvalues() -> None:
    """Print both, and how far each is from the truth."""
    ours(TOL, "small MLP"), theirs(TOL, "small MLP")  # both import parts of torch when first used
    begin = time.perf_counter()
    pairs = ours(TOL)
    own = time.perf_counter() - begin
    print(f"curvalg: {own:.2f} s, {pairs.products} products, {pairs.method}", flush=True)
    begin = time.perf_counter()
    values, products = theirs(TOL)
    peer = time.perf_counter() - begin
    print(f"scipy on curvlinops: {peer:.2f} s, {products} products; ratio {own / peer:.3f}", flush=True)
    truth = ours(1e-5).eigenvalues.numpy()
    scale = np.abs(truth).max()
    for label, found in (("curvalg", pairs.eigenvalues.numpy()), ("scipy", values)):
        print(f"{label}: largest error {np.abs(found - truth).max() / scale:.1e} of the largest eigenvalue")


def density() -> None:
    """Print the times of both, wall-clock and of the processor, and the moments of the nodes."""
    torch.manual_seed(0)
    model, (X, y) = MODELS["MLP"]()
    begin, used = time.perf_counter(), time.process_time()
    problem = Problem(model, nn.CrossEntropyLoss(), (X, y))
    found = spectral_density(registry.build("hessian").lower(problem), probes=PROBES, steps=STEPS)
    own, own_used = time.perf_counter() - begin, time.process_time() - used
    print(f"curvalg: {own:.2f} s ({own_used:.2f} s of processor), {found.products} products, {found.method}; ", end="")
    print(f"{1e3 * own_used / found.products:.1f} ms of processor for each product with orthogonalisation", flush=True)
    begin, used = time.perf_counter(), time.process_time()
    params = list(model.parameters())
    plain = HessianLinearOperator(model, nn.CrossEntropyLoss(), params, [(X, y)], check_deterministic=False)
    cached = LanczosApproximateSpectrumCached(plain, STEPS)
    bounds = time.perf_counter() - begin
    cached.approximate_spectrum(num_repeats=PROBES)
    peer, peer_used = time.perf_counter() - begin, time.process_time() - used
    print(f"curvlinops: {peer:.2f} s ({peer_used:.2f} s of processor), of which {bounds:.2f} s for bounds; ", end="")
    print(f"ratio {own / peer:.3f} (processor {own_used / peer_used:.3f}), without bounds {own / (peer - bounds):.3f}")
    theirs = [(values.double(), vectors[0].double() ** 2) for values, vectors in cached._lanczos_iters]
    for power in (1, 2):
        first = float((found.weights * found.nodes**power).sum(1).mean())
        second = float(np.mean([float((weights * values**power).sum()) for values, weights in theirs]))
        print(f"moment {power}: curvalg {first:.4e}, curvlinops {second:.4e}")


SECTIONS: dict[str, Callable[[], None]] = {"eigenvalues": eigenvalues, "density": density, "trace": traces}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or SECTIONS:
        SECTIONS[name]()
