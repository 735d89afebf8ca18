"""Fixtures of the tests of operators."""

from __future__ import annotations

import pytest

from curvalg import Identity, registry


@pytest.fixture
def ggn(problem_of):
    """The damped GGN of a small network."""
    return (registry.build("ggn") + 0.1 * Identity).lower(problem_of("mlp"))
