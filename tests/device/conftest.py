"""Tests of devices: on a GPU, or on a simulated one (tests/support/simulated_gpu.py); skipped where there is neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="there is no GPU, and none is simulated (-p tests.support.simulated_gpu)")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)
