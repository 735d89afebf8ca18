"""Exact inverses and spectra through the dual form, preconditioned solves, and block-diagonal products.

::

    python benchmarks/inverses.py

Figures are wall-clock seconds on the machine at hand, one run each (set-up happens once by nature), products and solves as
medians; run it with nothing beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from models import MODELS
from torch import nn

from curvalg import Identity, Problem, block_diagonal, inverse, nystrom, registry
from curvalg.cli.problems import digits

GGN = registry.build("ggn")


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Time of one run, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def median(run: Callable[[], Any], rounds: int = 9) -> float:
    """Median time."""
    run()
    return statistics.median(seconds(run)[0] for _ in range(rounds))


def problem_of(name: str) -> Problem:
    """A fresh problem, nothing kept."""
    torch.manual_seed(0)
    model, (X, y) = MODELS[name]()
    return Problem(model, nn.CrossEntropyLoss(), (X, y))


def dual() -> None:
    """Spectrum and damped solves of the GGN of an MLP with 670k parameters."""
    problem = problem_of("MLP")
    took, pairs = seconds(lambda: GGN.lower(problem).exact("eigh"))
    print(
        f"all {len(pairs.eigenvalues)} non-zero eigenvalues: {took:.2f} s, largest {float(pairs.eigenvalues[-1]):.5f}"
    )

    problem = problem_of("MLP")
    v, plain = torch.randn(problem.size), GGN.lower(problem)
    for number, damping in enumerate((1e-2, 1e-3)):
        op = inverse(GGN + damping * Identity, on_fail="warn").lower(problem)
        took, x = seconds(lambda op=op: op @ v)
        again = median(lambda op=op: op @ v)
        residual = float((plain @ x + damping * x - v).norm() / v.norm())
        label = "set-up and first solve" if not number else "first solve of another damping"
        print(
            f"damping {damping:g}: {label} {took:.2f} s, each further {again:.3f} s, relative residual {residual:.1e}"
        )
    g = problem.gradient()
    op = inverse(GGN + 1e-6 * Identity, rtol=1e-4).lower(problem)
    took, x = seconds(lambda: op @ g)
    residual = float((plain @ x + 1e-6 * x - g).norm() / g.norm())
    print(f"damping 1e-06, a gradient: {took:.2f} s, relative residual {residual:.1e}")


def krylov() -> None:
    """Iterations of conjugate gradients on an ill-conditioned problem, plain and preconditioned."""
    problem = digits()
    top = float(GGN.lower(problem).exact("eigh").eigenvalues[-1])
    damping = 1e-5 * top
    damped, g = GGN + damping * Identity, problem.gradient()
    candidates = {
        "plain": None,
        "nystrom(ggn, 200)": nystrom(GGN, 200) + damping * Identity,
        "block_diagonal(ggn, by='module')": block_diagonal(damped, by="module"),
    }
    for label, preconditioner in candidates.items():
        op = inverse(damped, solver="cg", preconditioner=preconditioner).lower(problem)
        took, result = seconds(lambda op=op: op.solve(g))
        print(
            f"cg, {label}: {int(result.iterations)} products, {took:.2f} s, residual {float(result.residual / g.norm()):.1e}"
        )


def blocks() -> None:
    """Block-diagonal products against full ones."""
    for name in ("MLP", "CNN"):
        problem = problem_of(name)
        v = torch.randn(problem.size)
        for term in ("ggn", "covariance", "hessian"):
            matrix = registry.build(term)
            runs = {"full": matrix.lower(problem)}
            runs |= {by: block_diagonal(matrix, by=by).lower(problem) for by in ("module", "parameter")}
            times = {label: median(lambda op=op, v=v: op @ v) for label, op in runs.items()}
            shown = ", ".join(f"by {by} {times[by] / times['full']:.2f}" for by in ("module", "parameter"))
            print(f"{name}, {term}: blocks as multiples of a full product ({1e3 * times['full']:.1f} ms): {shown}")


if __name__ == "__main__":
    dual()
    krylov()
    blocks()
