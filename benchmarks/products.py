"""Time of curvature products, kept, as multiples of one gradient, interleaved with curvlinops in one process.

::

    python benchmarks/products.py [--json products.json] [--rounds 9]

Every round times each contestant once, in turn, so that a drifting machine hits all alike; medians are reported. The
values of both libraries are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import curvlinops
import torch
import torch.nn.functional as F
from models import MODELS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvalg import Problem, registry

TERMS = {
    "hessian": curvlinops.HessianLinearOperator,
    "ggn": curvlinops.GGNLinearOperator,
    "covariance": curvlinops.EFLinearOperator,
}


def contestants(name: str) -> dict[str, Callable[[], Tensor]]:
    """What is timed on one model, by label; values are checked to agree."""
    torch.manual_seed(0)
    model, (X, y) = MODELS[name]()
    loss = nn.CrossEntropyLoss()
    parameters = list(model.parameters())
    problem = Problem(model, loss, (X, y))
    v = torch.randn(problem.size)
    build = registry.build
    ours = {term: build(term).lower(problem) for term in TERMS}
    ours["sum"] = (build("hessian") + build("ggn") + build("covariance")).lower(problem)
    theirs = {term: make(model, loss, parameters, [(X, y)], check_deterministic=False) for term, make in TERMS.items()}

    def gradient() -> Tensor:
        return torch.autograd.grad(F.cross_entropy(model(X), y), parameters)[0]

    runs: dict[str, Callable[[], Tensor]] = {"gradient": gradient}
    for term, op in ours.items():
        runs[f"curvalg {term}"] = lambda op=op: op @ v  # type: ignore[misc]
    for term, op in theirs.items():
        runs[f"curvlinops {term}"] = lambda op=op: op @ v  # type: ignore[misc]
        _compare(name, term, ours[term] @ v, op @ v, lambda: _double_backward(model, parameters, X, y, v))
    runs["curvlinops sum"] = lambda: sum(op @ v for op in theirs.values())  # type: ignore[return-value]
    return runs


def _compare(name: str, term: str, own: Tensor, peer: Tensor, reference: Callable[[], Tensor]) -> None:
    """Both libraries must agree, but where the peer defines another matrix or is wrong, which is said."""
    if (own - peer).norm() <= 1e-3 * peer.norm():
        return
    if term == "hessian":
        expected = reference()
        assert (own - expected).norm() <= 1e-3 * expected.norm(), f"{name}: wrong Hessian"
        off = float((peer - expected).norm() / expected.norm())
        print(f"{name}, {term}: curvlinops is off by {100 * off:.1f} % against double backward")
        return
    # They count every token of a sequence as a sample of its own, and scale by their number.
    assert (name, term) == ("GPT", "covariance"), f"{name}, {term}: the libraries disagree"
    print(f"{name}, {term}: the libraries define a sample differently (sequence, token)")


def _double_backward(model: nn.Module, parameters: list[nn.Parameter], X: Tensor, y: Tensor, v: Tensor) -> Tensor:
    gradient = torch.autograd.grad(F.cross_entropy(model(X), y), parameters, create_graph=True)
    product = torch.cat([g.reshape(-1) for g in gradient]) @ v
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(product, parameters)])


def measure(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median seconds of each contestant, after it has made whatever it keeps."""
    for run in runs.values():
        for _ in range(3):
            run()
    for label in [label for label in runs if label.startswith("curvalg")]:
        for _ in range(32):  # past the product at which a linearised program may be tried
            runs[label]()
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            start = time.perf_counter()
            run()
            times[label].append(time.perf_counter() - start)
    return {label: statistics.median(values) for label, values in times.items()}


def main() -> None:
    """Print a table per model; write all seconds to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write seconds and environment to this file")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = {}
    for name in options.models:
        rounds = options.rounds * (20 if name == "small MLP" else 1)
        with sdpa_kernel(SDPBackend.MATH):  # curvlinops differentiates through attention as it finds it
            seconds = results[name] = measure(contestants(name), rounds)
        base = seconds["gradient"]
        print(f"{name}: one gradient {1e3 * base:.3g} ms")
        for term in (*TERMS, "sum"):
            own, peer = seconds[f"curvalg {term}"] / base, seconds[f"curvlinops {term}"] / base
            print(f"  {term:12} curvalg {own:6.2f}   curvlinops {peer:6.2f}   {peer / own:5.1f} x faster", flush=True)
    if options.json:
        environment = {
            "torch": torch.__version__,
            "curvlinops": getattr(curvlinops, "__version__", "unknown"),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
        }
        options.json.write_text(json.dumps({"environment": environment, "seconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
