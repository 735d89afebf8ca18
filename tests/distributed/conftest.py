"""Processes that tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import Ranks


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that start processes run one after the other, on one worker: two pools would wait for each other's turns."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(scope="session")
def ranks():
    """Four processes of one group."""
    pool = Ranks()
    yield pool
    pool.close()
