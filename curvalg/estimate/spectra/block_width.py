"""The width of a block of products: measured once, then kept with the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from curvalg.distributed.group import active
from curvalg.solve import Matmul
from curvalg.tensors.clock import synchronize
from curvalg.tensors.spaces import VectorSpace
from curvalg.tensors.spaces.vector_space import space_of

GROWTH = 0.4
"""Blocks of width b need about b^GROWTH times as many products as single vectors (ten eigenvalues of a Hessian: 1.26 times
for 2, 2.4 times for 8)."""
WORK = 5e-3
"""Seconds of a step on a CPU above which it is arithmetic rather than calls, which wider blocks do not save."""
WIDEST = 4
"""Wider blocks seldom pay, and measuring them costs products."""


def choose_width(
    matmul: Matmul, start: Tensor, most: int, clock: Callable[[], float] | None = None, space: VectorSpace | None = None
) -> int:
    """The width of least predicted time among 1, 2, 4, …; stops where doubling does not pay.

    Args:
        matmul: the product, and whatever else belongs to a step.
        start: any columns (n, 1), to multiply.
        most: the widest that makes sense.
        clock: seconds; None: those of a process that decides for all.
        space: that the columns are in, which are whole by default; of processes that hold parts of them the slowest decides.
    """
    clock, space = clock or active().clock, space_of(start, space, 0)
    matmul(start)  # what is made once, such as a recording, is not a cost of each product
    best, least = 1, float("inf")
    for width in _widths(min(most, WIDEST)):
        columns = start.expand(-1, width).contiguous()
        if width == 2:
            matmul(columns)  # operators measure once how to take several columns
        synchronize(columns.device)
        begin = clock()
        matmul(columns)
        synchronize(columns.device)
        seconds = space.longest(clock() - begin)
        if width == 1 and seconds > WORK and columns.device.type == "cpu":
            return 1
        cost = seconds * width ** (GROWTH - 1)
        if cost >= least:
            break
        best, least = width, cost
    return best


def _widths(most: int) -> Iterator[int]:
    width = 1
    while width <= most:
        yield width
        width *= 2
