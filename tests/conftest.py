"""Fixtures shared by all tests."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from dense import Case, Dense
from zoo import make

from curvalg import Problem
from curvalg.problem.kept.race import Race

NIGHTLY = os.environ.get("CURVALG_NIGHTLY") == "1"
"""Whether the thorough versions of random tests run."""


@functools.cache
def _dense(name: str) -> Dense:
    return Dense(make(name))


@pytest.fixture
def dense_of():
    """name -> dense reference matrices of a zoo case, built once per process."""
    return _dense


@pytest.fixture
def problem_of():
    """(name or case, options) -> a fresh Problem."""

    def build(case: str | Case, data: object = None, **options: object) -> Problem:
        case = make(case) if isinstance(case, str) else case
        return Problem(case.model, case.loss, case.batches if data is None else data, **{**case.options, **options})

    return build


@pytest.fixture
def vectors():
    """(size, columns) -> fixed random float64 columns."""

    def draw(size: int, columns: int = 3, seed: int = 1) -> torch.Tensor:
        return torch.randn(size, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return draw


@pytest.fixture
def counted_model(problem_of):
    """name -> (problem, a function that tells how often the model's forward ran)."""

    def build(name: str, **options: object):
        case = make(name)
        count = [0]
        inner = case.model.forward

        def forward(*args: object, **kwargs: object) -> object:
            count[0] += 1
            return inner(*args, **kwargs)

        case.model.forward = forward  # type: ignore[method-assign]
        return problem_of(case, **options), lambda: count[0]

    return build


@pytest.fixture
def take_way(monkeypatch):
    """way -> from now on it is taken wherever it is possible, whatever is faster."""
    run = Race.run

    def take(way: str) -> None:
        def chosen(self: Race, candidates, **options):
            fastest = run(self, candidates, **options)
            if "ordinary" not in candidates or self.of_an_earlier_run:
                return fastest
            return self.decide(way if way in candidates and way not in self.declined else "ordinary")

        monkeypatch.setattr(Race, "run", chosen)

    return take
