"""Fixtures of the tests of the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def docs() -> Path:
    """The folder of the documentation."""
    return Path(__file__).parents[2] / "docs"
