"""Kernels of several processes, which send each other what their layers were given and gave."""

from __future__ import annotations

import pytest

from tests.support.agreement import agree
from tests.support.rank_kernels import MODELS, kernel, kernel_of_processes


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_every_kind_travel(ranks, name):
    agree(ranks.run(3, kernel_of_processes, name), kernel(name))
