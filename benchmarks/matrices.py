"""Building explicit matrices, against curvlinops (KFAC, EKFAC) and BackPACK (diagonal of the GGN), interleaved.

::

    python benchmarks/matrices.py

Every run starts from a fresh problem, so that counting the data and checking layer records on first use are inside. Medians
of five rounds; values are compared first.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import curvlinops
import torch
from backpack import backpack, extend
from backpack.extensions import DiagGGNExact
from models import MODELS
from torch import Tensor, nn

from curvalg import Problem, registry

PEERS = {"kfac": curvlinops.KFACLinearOperator, "ekfac": curvlinops.EKFACLinearOperator}
KINDS = {"exact": "type-2", "empirical": "empirical", "mc": "mc"}


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Median seconds by label."""
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds + 1):
        for label, run in runs.items():
            start = time.perf_counter()
            run()
            times[label].append(time.perf_counter() - start)
    return {label: statistics.median(ts[1:]) for label, ts in times.items()}


def kronecker(name: str) -> None:
    """KFAC and EKFAC, built and multiplied once."""
    torch.manual_seed(0)
    model, (X, y) = MODELS[name]()
    loss, v = nn.CrossEntropyLoss(), torch.randn(sum(p.numel() for p in model.parameters()))
    for term, peer in PEERS.items():
        for fisher, kind in KINDS.items():

            def ours(term: str = term, fisher: str = fisher) -> Tensor:
                product: Tensor = registry.build(term, fisher=fisher).lower(Problem(model, loss, (X, y))) @ v
                return product

            def theirs(peer: Any = peer, kind: str = kind) -> Tensor:
                operator = peer(
                    model,
                    loss,
                    list(model.parameters()),
                    [(X, y)],
                    fisher_type=kind,
                    separate_weight_and_bias=False,
                    check_deterministic=False,
                )
                product: Tensor = operator @ v
                return product

            a, b = ours(), theirs()
            difference = float((a - b).norm() / b.norm())
            times = interleaved({"ours": ours, "theirs": theirs})
            ratio = times["ours"] / times["theirs"]
            print(
                f"{name} {term} {fisher}: {times['ours']:.3f} s, {ratio:.2f} of curvlinops' (difference {difference:.0e})"
            )


def diagonal() -> None:
    """The exact diagonal of the GGN of an MLP 784-128-10 on 256 rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 10))
    X, y, loss = torch.randn(256, 784), torch.randint(0, 10, (256,)), nn.CrossEntropyLoss()
    twin, twin_loss = extend(nn.Sequential(*model)), extend(nn.CrossEntropyLoss())
    ones = torch.ones(sum(p.numel() for p in model.parameters()))

    def ours() -> Tensor:
        product: Tensor = registry.build("ggn_diagonal").lower(Problem(model, loss, (X, y))) @ ones
        return product

    def theirs() -> Tensor:
        with backpack(DiagGGNExact()):
            twin_loss(twin(X), y).backward()
        return torch.cat([p.diag_ggn_exact.reshape(-1) for p in twin.parameters()])  # type: ignore[attr-defined]

    a, b = ours(), theirs()
    times = interleaved({"ours": ours, "theirs": theirs}, 9)
    difference = float((a - b).norm() / b.norm())
    ratio = times["ours"] / times["theirs"]
    print(f"diagonal of the GGN: {1e3 * times['ours']:.1f} ms, {ratio:.2f} of BackPACK's (difference {difference:.0e})")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    diagonal()
    for model_name in ("MLP", "CNN"):
        kronecker(model_name)
