"""Stops whatever runs at a given operation: out of memory, or Ctrl-C, where there is neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Interruption(TorchDispatchMode):
    """Raises once, at the operation of the given number; the context is quiet about the rest.

    Args:
        number: of operations before.
        error: makes what is raised.
    """

    def __init__(self, number: int, error: Callable[[], BaseException]) -> None:
        super().__init__()
        self.left, self.error, self.raised = number, error, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            self.raised = True
            raise self.error()
        return func(*args, **(kwargs or {}))


class OperationCount(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))
