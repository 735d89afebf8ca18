"""Fixtures shared by all tests."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from curvalg import Problem
from tests.support.dense import Case, Dense
from tests.support.inside import Inside, Products
from tests.support.zoo import make


@functools.cache
def _dense(name: str) -> Dense:
    return Dense(make(name))


@pytest.fixture(autouse=True)
def _figures():
    """Pictures of a test are closed after it; pyplot keeps them, and warns where there are many."""
    yield
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close("all")


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
def inside(monkeypatch):
    """What lies inside the library, to be read and exchanged; see :class:`Inside`."""
    return Inside(monkeypatch)


@pytest.fixture
def products(inside):
    """Counts the products of operators, and interrupts one."""
    return Products(inside)


@pytest.fixture
def take_way(inside):
    """way -> from now on it is taken wherever it is possible, whatever is faster."""
    choose = inside["choose_way"]

    def take(way: str) -> None:
        def chosen(self, candidates, **options):
            fastest = choose(self, candidates, **options)
            if "ordinary" not in candidates or self.of_an_earlier_run:
                return fastest
            return self.decide(way if way in candidates and way not in self.declined else "ordinary")

        inside(choose_way=chosen)

    return take


@pytest.fixture
def process_group(tmp_path):
    """A process group of this process alone."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    if distributed.is_initialized():
        pytest.skip("a process group is open already")
    try:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    except RuntimeError as error:
        pytest.skip(f"no process group: {error}")
    try:
        yield distributed
    finally:
        distributed.destroy_process_group()
