"""Spectra of the Hessian of an MLP with 670k parameters, against SciPy and curvlinops.

::

    python benchmarks/spectra.py              # everything
    python benchmarks/spectra.py eigenvalues  # the ten largest, against SciPy on curvlinops' operator
    python benchmarks/spectra.py density      # 10 probes of 50 steps, against curvlinops

Both sides take the same Hessian, in float32, one after the other in one process, set-up included. Eigenvalues are to the
tolerance 1e-3, and the truth is a run to 1e-5. Densities are compared by the first moments of their nodes; the bounds of the
spectrum, which curvlinops computes first, are part of its time and also given apart. Figures are wall-clock seconds on the
machine at hand; run it with nothing beside it.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from curvlinops import HessianLinearOperator
from curvlinops.papyan2020traces.spectrum import LanczosApproximateSpectrumCached
from models import MODELS
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import nn

from curvalg import Problem, registry
from curvalg.estimate import Eigenpairs, eigsh, spectral_density

K, TOL = 10, 1e-3
PROBES, STEPS = 10, 50


def ours(tol: float) -> Eigenpairs:
    """On a fresh problem, nothing kept."""
    torch.manual_seed(0)
    model, (X, y) = MODELS["MLP"]()
    problem = Problem(model, nn.CrossEntropyLoss(), (X, y))
    return eigsh(registry.build("hessian").lower(problem), K, which="LA", tol=tol)


def theirs(tol: float) -> tuple[np.ndarray, int]:
    """Eigenvalues, ascending, and the number of products."""
    torch.manual_seed(0)
    model, (X, y) = MODELS["MLP"]()
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


def eigenvalues() -> None:
    """Print both, and how far each is from the truth."""
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


SECTIONS: dict[str, Callable[[], None]] = {"eigenvalues": eigenvalues, "density": density}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or SECTIONS:
        SECTIONS[name]()
