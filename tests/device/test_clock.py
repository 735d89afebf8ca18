"""A clock waits for the device before it starts and before it stops, whatever the kind of the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from curvalg import Problem, registry
from tests.support.devices import moved
from tests.support.zoo import make


@pytest.fixture
def events(monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: found.append("wait"))
    return found


def test_of_one_run(events, inside):
    assert inside["clock"](lambda: events.append("run"), torch.device("cuda", 0))[0] >= 0
    assert events == ["wait", "run", "wait"]


def test_on_the_cpu_nothing_waits(events, inside):
    inside["clock"](lambda: events.append("run"), torch.device("cpu"))
    assert events == ["run"]


@pytest.mark.parametrize("kind", ["xpu", "mtia", "mps"])
def test_of_other_kinds_of_devices(kind, monkeypatch, inside):
    found = []
    module = SimpleNamespace(synchronize=lambda *device: found.append("wait"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.mps, "synchronize", module.synchronize)
    inside["clock"](lambda: found.append("run"), torch.device(kind, 0))
    assert found == ["wait", "run", "wait"]


def test_of_a_race(events, inside):
    """The results of candidates say nothing of where they were computed: the problem does."""
    case = make("mlp")
    problem = Problem(case.model.cuda(), case.loss, moved(case.batches))
    way = lambda: inside["candidate"](lambda: events.append("run"), rounds=1, warm=True)
    inside["measure"]({"one": way(), "other": way()}, 1, lambda seconds: False, problem.measured.device)
    assert events == ["wait", "run", "wait"] * 2


def test_of_the_width_of_a_block(events, inside):
    case = make("mlp")
    op = registry.build("ggn").lower(Problem(case.model.cuda(), case.loss, moved(case.batches)))
    start = torch.ones(op.shape[1], 1, dtype=torch.float64, device="cuda")
    op @ start
    events.clear()

    def product(x):
        events.append("run")
        return x

    inside["choose_width"](product, start, 1)
    assert events == ["run", "wait", "run", "wait"]
