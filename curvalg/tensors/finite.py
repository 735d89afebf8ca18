"""A last look at results."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvalg.errors import ProblemError


def require_finite(result: Tensor, what: object) -> Tensor:
    """Raises:
    ProblemError: a product with NaN or infinite entries.
    """
    # The sum is finite where all entries are, and costs no buffer; only if it is not, a closer look is needed.
    if not math.isfinite(result.sum().item()) and not bool(torch.isfinite(result).all()):
        raise ProblemError(
            f"the product with {what} has NaN or infinite entries; the loss or a second derivative is not finite there "
            "(half precision overflows in double backward: use float32 or bfloat16)"
        )
    return result
