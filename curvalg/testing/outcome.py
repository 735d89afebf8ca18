"""The outcome of a check: it returns, does not apply, or says what was expected, what came and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

RTOL = {torch.float64: 1e-8, torch.float32: 5e-4}
"""Relative difference up to which two matrices of a precision count as equal."""


class NotApplicable(Exception):
    """A check does not apply; the message says why."""


class Failure(AssertionError):
    """A check failed on a term.

    Args:
        expected: what the contract asks for.
        got: what came instead.
        cure: what to do about it.
    """

    def __init__(self, expected: str, got: str, cure: str) -> None:
        super().__init__(f"expected {expected}; got {got}. {cure}")


def require_close(
    got: Tensor,
    expected: Tensor,
    *,
    what: str,
    cure: str,
    scale: Tensor | float | None = None,
    rtol: float | None = None,
) -> None:
    """Fail unless two results agree.

    Args:
        got: the result.
        expected: what it should be.
        what: the equation, as in "the transpose of the transpose is the matrix".
        cure: what to do.
        scale: size that differences are measured against; None: the norm of ``expected``.
        rtol: relative difference that is allowed; None: by the coarser of the two precisions.
    """
    if got.shape != expected.shape:
        raise Failure(what, f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}", cure)
    coarse = min((got.dtype, expected.dtype), key=lambda d: -torch.finfo(d).eps)
    allowed = RTOL.get(coarse, 5e-2) if rtol is None else rtol
    got, expected = got.double().cpu(), expected.double().cpu()
    size = float(expected.norm() if scale is None else scale)
    difference = (got - expected).abs()
    norm = float(difference.norm())
    if norm <= allowed * size + torch.finfo(torch.float64).tiny:
        return
    at = int(difference.flatten().nan_to_num(nan=float("inf")).argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(at, device="cpu"), got.shape))
    relative = f"{norm / size:.1e}" if size else "infinite"
    shown = f"entry {place} is" if got.ndim else "it is"
    raise Failure(
        what,
        f"a relative difference of {relative} ({shown} {got[place].item():.6g}, not {expected[place].item():.6g})",
        cure,
    )
