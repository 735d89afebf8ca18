"""The peak of memory of one answer, in a process of its own: ``python -m benchmarks.peak JSON`` prints bytes.

Net of what was there before: libraries, model and data, and what a small model brought in on first use.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from benchmarks.effort import Sizes
from benchmarks.peers import load
from benchmarks.session import quiet
from benchmarks.workload import Workload, build, fair_attention

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class HostPeak:
    """Resident memory; Linux lets a process forget its peak, elsewhere it is that of the whole life."""

    def reset(self) -> None:
        """Forget what was."""
        if RESET.exists():
            RESET.write_text("5")

    def peak(self) -> int:
        """Bytes."""
        if STATUS.exists():
            lines = (line.split() for line in STATUS.read_text().splitlines())
            found = next((int(words[1]) for words in lines if words[:1] == ["VmHWM:"]), None)
            if found is not None:
                return 1024 * found
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class DevicePeak:
    """Memory of torch's allocator on a GPU."""

    def reset(self) -> None:
        """Forget what was."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_allocated()


def measure(peer: str, question: str, model: str, device: str = "cpu") -> int | None:
    """Net bytes of setting up and answering once; None where the library has no answer.

    Args:
        peer: a file in ``benchmarks/peers``.
        question: a key of ``QUESTIONS``.
        model: a key of ``MODELS``.
        device: "cpu" or "cuda".
    """
    contestant = load(peer)

    def answer(workload: Workload) -> bool:
        with workload.closing:
            run = contestant.prepare(question, workload)
            if run is not None:
                run()
        return run is not None

    gauge = DevicePeak() if device.startswith("cuda") else HostPeak()
    with quiet(), fair_attention():
        for small in ("tiny", "tiny LM"):
            answer(build(small, Sizes(), device))
        workload = build(model, Sizes(), device)
        gauge.reset()
        before = gauge.peak()
        answered = answer(workload)
    return gauge.peak() - before if answered else None


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
