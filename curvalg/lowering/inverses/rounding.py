"""Rounding of products, and the tolerances that fit it."""

from __future__ import annotations

import torch

from curvalg.problem import Problem

SPARE = 4
"""Products in half precision are this many of its units off, or more where matrices are badly conditioned."""


def epsilon(problem: Problem) -> float:
    """The coarsest unit of rounding among the parameters, what the model is cast to, and the results."""
    dtypes = {problem.dtype, *problem.layout.dtypes.values()}
    if problem.autocast is not None:
        dtypes.add(problem.autocast)
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def noise(problem: Problem) -> float:
    """The ε of the rounding ε ‖A‖ ‖x‖ that solves by default have to live with: 0 unless a model computes in half precision."""
    return SPARE * found if (found := epsilon(problem)) > torch.finfo(torch.float32).eps else 0.0


def default_rtol(problem: Problem) -> float:
    """The tolerance of inverses that name none: 1e-8 in float64, 1e-5 in float32; 0.03 in bfloat16, 0.004 in float16."""
    return max(1e-8 if problem.dtype == torch.float64 else 1e-5, noise(problem))
