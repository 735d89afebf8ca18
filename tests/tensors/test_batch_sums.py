"""Sums over batches own what they write into."""

from __future__ import annotations

import copy

import torch

from curvalg.tensors import BatchSum


def test_sums_own_what_they_write_into():
    first, second = torch.ones(3), torch.ones(3)
    total = BatchSum(None)
    for part in (first, second, second):
        total.add(part)
    assert torch.equal(total.value, 3 * torch.ones(3))
    assert torch.equal(first, torch.ones(3)) and torch.equal(second, torch.ones(3))
    statistics = {"mean": torch.ones(2), "counts": (torch.ones(1, dtype=torch.long),)}
    kept = copy.deepcopy(statistics)
    total = BatchSum(torch.float64)
    for _ in range(3):
        total.add(statistics)
        total.add(None)
    assert total.value["mean"].dtype == torch.float32 and total.value["counts"][0].dtype == torch.long
    assert torch.equal(total.value["mean"], torch.full((2,), 3.0)) and int(total.value["counts"][0]) == 3
    assert torch.equal(statistics["mean"], kept["mean"])
    assert BatchSum(torch.float64).value is None
