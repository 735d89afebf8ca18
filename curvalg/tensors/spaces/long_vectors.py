"""Long vectors as rows: their memory, their lengths and inner products, and the parts of them that a cache holds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from curvalg.tensors.memory import wide, widest

SLICE = 2**16
"""Entries of each vector that a device converts to float64 at a time."""
CACHED, SHORTEST = 2**17, 2**10
"""Numbers of all rows together that a CPU works on at a time, 1 MiB in float64, and the fewest of each row."""
RUN, LONG = 256, 2**12
"""Entries whose squares may be summed in float32, as the rounding errors of many such sums hardly add up; fewest to do so."""
LOW, HIGH = 1e-10, 1e15
"""Lengths between these have squares that float32 holds."""
LARGE, ALIGNMENT = 2**22, 64
"""Bytes from which on NumPy asks for huge pages, and bytes that torch aligns memory to."""


def vacant(rows: int, size: int, like: Tensor) -> Tensor:
    """Memory for rows (rows, size) of the dtype and device of a tensor; what is in it has no meaning yet."""
    nbytes = rows * size * like.itemsize
    if like.device.type != "cpu" or nbytes < LARGE:
        return torch.empty(rows, size, dtype=like.dtype, device=like.device)
    # NumPy asks the system for huge pages, which torch does not: small ones cost more than what is written into them.
    raw = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw[begin : begin + nbytes]).view(like.dtype).view(rows, size)


def parts(size: int, rows: int, device: torch.device) -> Iterator[slice]:
    """Slices of the entries of vectors; on a CPU a slice of so many rows in float64 stays in its cache."""
    step = max(SHORTEST, CACHED // max(1, rows)) if device.type == "cpu" else SLICE
    return (slice(at, at + step) for at in range(0, size, step))


def lengths(rows: Tensor) -> Tensor:
    """The Euclidean lengths of rows (m, n), (m,) in float64 on their device.

    On a CPU, float32 is five times as fast as float64: runs of squares are summed in float32, and the runs in float64.
    """
    whole = rows.shape[1] // RUN * RUN
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and whole >= LONG:
        runs = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, RUN)), dim=2)
        rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=torch.float64)
        found = torch.hypot(torch.linalg.vector_norm(runs, dim=1, dtype=torch.float64), rest)
        if bool(((found > LOW) & (found < HIGH)).all()):
            return found
    exact: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=widest(rows.device))
    return exact


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of two vectors (n,), in float64 on their device."""
    if x.device.type != "cpu":
        return torch.dot(wide(x), wide(y))
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for part in parts(len(x), 2, x.device):
        total += torch.dot(x[part].double(), y[part].double())
    return total
