"""The terms and sums whose every product is compared with a dense reference, and how near it must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.support.ranks import Failed

TERMS = ["hessian", "ggn", "residual", "covariance", "centered_covariance", "jacobian", "loss_hessian"]
SUMS = {
    "fused": ({"hessian": 2, "ggn": 1, "covariance": -3}, 1e-3),
    "two stages": ({"hessian": -0.7, "centered_covariance": 0.3, "ggn": 1.25}, 0.0),
    "no u": ({"ggn": 0.5, "covariance": -1.5, "centered_covariance": 2}, -2.0),
}
"""Name -> (term and its coefficient, a multiple of the identity)."""


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Of the same shape, and equal but for rounding."""
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 1e-10 * max(expected.norm(), 1e-3)


def agree(results: Sequence[torch.Tensor | Failed], expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    """What each of several processes gives is what one process gives, but for a relative error."""
    assert not [result for result in results if isinstance(result, Failed)], results
    assert [got.shape for got in results] == [expected.shape] * len(results)
    errors = [float((got - expected).norm() / expected.norm().clamp_min(1e-300)) for got in results]
    assert max(errors) <= tolerance, errors
