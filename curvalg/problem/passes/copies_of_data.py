"""Data that several processes must have alike: those that hold other columns or rows of the same layers."""

from __future__ import annotations

import math

from curvalg.errors import ProblemError
from curvalg.problem.data.batches import ReadBatch
from curvalg.problem.data.row_hashes import Fingerprint, fingerprint, same_order
from curvalg.problem.model.sharded.sharded_model import ShardedModel
from curvalg.problem.setting import Setting


class CopiesOfData:
    """The batches of this process, to be compared with those of the processes that hold other parts of the same layers.

    Args:
        problem: of the processes; nothing is compared unless some of them must have the same data.
    """

    def __init__(self, problem: Setting) -> None:
        self._problem = problem
        self._rows: list[int] = []
        self._sums: list[tuple[float, float]] = []
        grid = problem.model.grid if isinstance(problem.model, ShardedModel) else None
        self._compared = problem.group.sharded and grid is not None and grid.copies > 1
        if self._compared and not problem.data.ordered:
            raise ProblemError(
                "the loader shuffles, but all processes of tensor parallelism need the same batches in the same order; pass "
                "shuffle=False, or the same list of batches on each of them"
            )

    def add(self, sample: ReadBatch) -> None:
        """Take one more batch."""
        if not self._compared:
            return
        weight = math.cos(len(self._rows))  # sums that see the order of the batches as well
        prints = fingerprint(sample.batch, sample.rows)
        before = self._sums or [(0.0, 0.0)] * len(prints)
        self._sums = [(s + weight * own, most + size) for (s, most), (own, size) in zip(before, prints, strict=True)]
        self._rows.append(sample.rows)

    def require_alike(self) -> None:
        """Raise unless the processes that must have the same data have them.

        Raises:
            ProblemError: they do not.
        """
        if not self._compared:
            return
        group = self._problem.group
        here: tuple[int, list[int], Fingerprint] = group.rank, self._rows, tuple(self._sums)
        every = group.vectors.objects(here)
        for number, (place, rows, sums) in enumerate(every):
            other = next(i for i, (its, _, _) in enumerate(every) if its == place)
            if rows != every[other][1] or not same_order(sums, every[other][2]):
                raise ProblemError(
                    f"processes {other} and {number} of the group have parts of the same layers (tensor parallelism), and so "
                    "need the same batches in the same order, but have others; give them the same data: all of them where "
                    "parallelize_module alone cuts the model, else curvalg.distributed.shard(..., group=mesh['data'])"
                )
