"""The terms and sums whose every product is compared with a dense reference, and how near it must be."""

from __future__ import annotations

import torch

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
