"""CUDA graphs: a function of one tensor, captured once and replayed without Python, autograd or launches.

Captured are the kernels with the memory that they read and write, so that a replay gives what the same calls would give again.
They must run on a stream of their own: autograd runs a backward pass on the stream of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WARM = 2
"""Calls before a capture, in which libraries choose kernels and take their workspaces."""


class SideStream:
    """A stream beside the caller's, entered and left in order with it.

    What is made on it may be used and dropped on any stream that has entered it: it waits for all of these when it is entered
    again, before it takes their memory.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._callers: dict[Any, torch.cuda.Stream] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return SideStream, (self.device,)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run what is inside on this stream, after what the caller's has been given, and before what it is given next."""
        caller = torch.cuda.current_stream(self.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        if caller == self._stream:
            yield
            return
        self._callers[caller] = caller
        for stream in self._callers:
            self._stream.wait_stream(stream)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)


class CudaGraph:
    """A function of one tensor as a CUDA graph, on the current stream, which must not be the default one.

    Args:
        function: x -> y by the same kernels on the same memory in every call, without a wait for the device.
        example: x; others must have its shape.
        pool: memory that graphs share which are never replayed at the same time.

    Raises:
        RuntimeError: the function cannot be captured.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], example: Tensor, pool: Any) -> None:
        device = example.device
        self._operand = example.clone()
        for _ in range(WARM):
            function(self._operand)
        before = torch.cuda.memory_reserved(device)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(
            self._graph, pool=pool, stream=torch.cuda.current_stream(device), capture_error_mode="thread_local"
        ):
            self._result = function(self._operand)
        self.nbytes = max(0, torch.cuda.memory_reserved(device) - before) + self._operand.nbytes + self._result.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """The function's result for x, in memory of its own."""
        self._operand.copy_(x)
        self._graph.replay()
        return self._result.clone()


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
