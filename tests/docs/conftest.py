"""The documentation's own code, as tests import it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
for folder in (ROOT / "docs" / "_ext", ROOT / "docs" / "checks"):
    sys.path.insert(0, str(folder))


@pytest.fixture
def docs() -> Path:
    """The folder of the documentation."""
    return ROOT / "docs"
