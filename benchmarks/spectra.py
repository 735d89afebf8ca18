"""The ten largest eigenvalues of the Hessian of an MLP with 670k parameters, against SciPy on curvlinops' operator.

::

    python benchmarks/spectra.py

Both take the same Hessian, in float32, to the tolerance 1e-3, one after the other in one process, set-up included; the truth
is a run to 1e-5. Figures are wall-clock seconds on the machine at hand; run it with nothing beside it.
"""

from __future__ import annotations

import time
import warnings

import numpy as np
import torch
from curvlinops import HessianLinearOperator
from models import MODELS
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import nn

from curvalg import Problem, registry
from curvalg.estimate import Eigenpairs, eigsh

K, TOL = 10, 1e-3


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


def main() -> None:
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


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
