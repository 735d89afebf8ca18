"""Fixtures of the tests of losses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support.loss_properties import (
    check_derivatives,
    check_factor,
    check_label_draws,
    check_signs,
    check_split,
    check_unmutated,
    dense_hessian,
    flat,
    outer,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def check() -> SimpleNamespace:
    """The properties of every loss."""
    return SimpleNamespace(
        split=check_split,
        derivatives=check_derivatives,
        factor=check_factor,
        label_draws=check_label_draws,
        signs=check_signs,
        unmutated=check_unmutated,
        dense_hessian=dense_hessian,
        flat=flat,
        outer=outer,
    )
