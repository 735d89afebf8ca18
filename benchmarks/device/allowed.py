"""The most that is allowed, in one place."""

from __future__ import annotations

WAITS = {
    "kept product, hessian": 1,
    "kept product, ggn": 1,
    "kept product, covariance": 1,
    "cg, an iteration": 1,
    "eigsh, a product": 2.1,
    "density, a product": 1,
    "inverse(kfac)": 1,
    "inverse by the Gram matrix": 1,
}
"""How often the host may wait for the device, for each product or iteration; a step of Lanczos, of two probes for a density,
waits twice, and its restarts now and then."""

PRECISION = {
    "float32": 1e-3,
    "float32 with TF32": 2e-2,
    "autocast bfloat16": 5e-2,
    "autocast float16": 2e-2,
}
"""Relative errors against float64."""
