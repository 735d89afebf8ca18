"""The benchmark suite runs on models of transformers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import session
from benchmarks.effort import EFFORTS
from benchmarks.models import MODELS

TINY = dataclasses.replace(EFFORTS["quick"], splits=(1,), rounds=1, seconds=0.0, minutes=5.0)
NAMES = [name for name in MODELS if name.startswith("tiny HF")]


@pytest.mark.parametrize("name", NAMES)
def test_products_agree_with_those_by_hand(name):
    results = session.run(["products"], [name], ["curvalg", "curvalg_fresh", "torch_by_hand"], TINY)
    assert len(results.records) == 4
    for record in results.records:
        assert not record.skipped
        assert {"gradient", "curvalg", "curvalg fresh"} <= set(record.values)
        assert all(check.verdict == "agrees" for check in record.checks.values())


@pytest.mark.parametrize(
    "name", [name for name, model in MODELS.items() if model.group == "library" and "124M" not in name]
)
def test_models_have_some_million_numbers_and_classes_on_axis_one(name):
    net, (inputs, labels) = MODELS[name].make()
    assert 1e6 < sum(p.numel() for p in net.parameters()) < 5e6
    with torch.no_grad():
        z = net(inputs)
    assert z.shape[:1] + z.shape[2:] == labels.shape
