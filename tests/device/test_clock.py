"""A clock waits for the device before it starts and before it stops, whatever the kind of the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from curvalg import Problem, registry
from curvalg.estimate.spectra.block_width import choose_width
from curvalg.problem.kept.race import Candidate, Race
from curvalg.tensors.clock import timed
from tests.support.devices import moved
from tests.support.zoo import make


@pytest.fixture
def events(monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: found.append("wait"))
    return found


def test_of_one_run(events):
    assert timed(lambda: events.append("run"), torch.device("cuda", 0))[0] >= 0
    assert events == ["wait", "run", "wait"]


def test_on_the_cpu_nothing_waits(events):
    timed(lambda: events.append("run"), torch.device("cpu"))
    assert events == ["run"]


@pytest.mark.parametrize("kind", ["xpu", "mtia", "mps"])
def test_of_other_kinds_of_devices(kind, monkeypatch):
    found = []
    module = SimpleNamespace(synchronize=lambda *device: found.append("wait"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.mps, "synchronize", module.synchronize)
    timed(lambda: found.append("run"), torch.device(kind, 0))
    assert found == ["wait", "run", "wait"]


def test_of_a_race(events):
    """The results of candidates say nothing of where they were computed: the problem does."""
    case = make("mlp")
    problem = Problem(case.model.cuda(), case.loss, moved(case.batches))
    way = lambda: Candidate(lambda: events.append("run"), rounds=1, warm=True)
    Race(problem.measured, "a choice").run({"one": way(), "other": way()})
    assert events == ["wait", "run", "wait"] * 2


def test_of_the_width_of_a_block(events):
    case = make("mlp")
    op = registry.build("ggn").lower(Problem(case.model.cuda(), case.loss, moved(case.batches)))
    start = torch.ones(op.shape[1], 1, dtype=torch.float64, device="cuda")
    op @ start
    events.clear()

    def product(x):
        events.append("run")
        return x

    choose_width(product, start, 1)
    assert events == ["run", "wait", "run", "wait"]
