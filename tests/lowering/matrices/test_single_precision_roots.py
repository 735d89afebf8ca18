"""Square roots in the precision of the problem, of matrices that are factorised in a higher one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Identity, Problem, inv_sqrt, registry, sqrt


@pytest.mark.parametrize("function", [sqrt, inv_sqrt])
def test_roots_of_dense_matrices_in_single_precision(function):
    torch.manual_seed(0)
    problem = Problem(nn.Linear(4, 3), nn.CrossEntropyLoss(), (torch.randn(30, 4), torch.arange(30) % 3))
    damped = registry.build("ggn") + 0.1 * Identity
    root = function(damped).lower(problem) @ torch.eye(problem.size)
    assert root.dtype == torch.float32
    expected = damped.lower(problem).to_dense()
    if function is inv_sqrt:
        expected = torch.linalg.inv(expected)
    torch.testing.assert_close(root @ root, expected)
