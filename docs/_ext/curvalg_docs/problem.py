"""The small fixed problem that the catalogue draws every matrix on."""

from __future__ import annotations

import torch
from torch import nn

from curvalg import Problem

CLASSES = 3
SAMPLES = 18


def small_problem(*, batches: int = 1, cache: int | str = "auto", verify: bool = True) -> Problem:
    """A network 4-5-3 with tanh after thirty steps of gradient descent on three overlapping clusters, in float64.

    Args:
        batches: how many batches the 18 samples come in.
        cache: as of ``Problem``.
        verify: as of ``Problem``.
    """
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(CLASSES).repeat_interleave(SAMPLES // CLASSES)
    centres = 1.5 * torch.randn(CLASSES, 4, generator=generator, dtype=torch.float64)
    X = centres[y] + torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(30):
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    rows = SAMPLES // batches
    # A list of batches keeps its order, which Monte-Carlo draws and outputs need.
    data = list(zip(X.split(rows), y.split(rows), strict=True))
    return Problem(model, loss, data, cache=cache, verify=verify)  # type: ignore[arg-type]
