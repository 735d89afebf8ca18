"""Ranks that wait for each other in different process groups find that out, rather than wait until the timeout."""

from __future__ import annotations

import time
from typing import Any

from curvalg.errors import GroupError

PATIENCE = 1.0
"""Seconds after which a rank that waits looks where the others are, and again before it believes what it saw."""
SHORTEST_PAUSE, LONGEST_PAUSE = 1e-5, 0.05


class Meeting:
    """Where the ranks of a process group wait for each other, written where all groups of these processes can read it.

    Two groups may have the same ranks. If one rank waits in the first and another in the second, neither can go on.

    Args:
        group: the process group.
    """

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        ranks = dist.get_process_group_ranks(group)
        self._name = str(group.group_name)
        self._store = _shared_store(group)
        self._place = f"curvalg/waits/{'-'.join(map(str, ranks))}"
        self._ranks, self._rank = len(ranks), dist.get_rank(group)

    def wait(self, work: Any) -> None:
        """Wait until an exchange of the group is over, whether it went well or not.

        Raises:
            GroupError: it will never be: others wait in another group.
        """
        self._store.set(f"{self._place}/{self._rank}", self._name)
        try:
            self._wait(work)
        finally:
            self._store.set(f"{self._place}/{self._rank}", "")

    def _wait(self, work: Any) -> None:
        looks = time.monotonic() + PATIENCE
        before: list[str] = []
        pause = SHORTEST_PAUSE
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            if time.monotonic() < looks:
                continue
            if told := self._read(f"left/{self._name}"):
                raise GroupError(told)
            where = [self._read(str(rank)) for rank in range(self._ranks)]
            if where == before and self._elsewhere(where):
                raise GroupError(self._tell(where))
            before, looks = where, time.monotonic() + PATIENCE

    def _read(self, key: str) -> str:
        key = f"{self._place}/{key}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _elsewhere(self, where: list[str]) -> bool:
        """Whether some wait in another group, and do not know yet that they do so in vain."""
        return any(name not in ("", self._name) and not self._read(f"left/{name}") for name in where)

    def _tell(self, where: list[str]) -> str:
        """Tell the ranks of all groups that this rank waits no longer, and why."""
        shown = "; ".join(f"rank {rank}: {name!r}" if name else f"rank {rank}: none" for rank, name in enumerate(where))
        said = (
            f"the ranks passed different process groups, which have the same members ({shown}), so that they wait for each "
            "other: make the group once, on all ranks, and pass it as group= on all of them"
        )
        for name in {*where, self._name} - {""}:
            self._store.set(f"{self._place}/left/{name}", said)
        return said


def _shared_store(group: Any) -> Any:
    """What all process groups write in; each has a part of its own, by a prefix."""
    store = group.get_group_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store
