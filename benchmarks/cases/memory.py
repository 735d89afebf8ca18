"""Peaks of memory, each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from benchmarks.cases.base import Case
from benchmarks.effort import Effort
from benchmarks.environment import ROOT
from benchmarks.results import Record, Task

if TYPE_CHECKING:
    from benchmarks.session import Session


UNITS = {"vocabulary": "chunked gradient"}
"""Models whose unit is not an ordinary gradient: its outputs alone would be most of the memory."""


class Memory(Case):
    """Of a first product, recording included."""

    name = "memory"
    says = "peak memory of a first product in a fresh process, net of libraries, model and data"
    models = ("GPT 64", "vocabulary")
    always = ("GPT 64", "vocabulary")

    def tasks(self, models: Sequence[str], effort: Effort) -> Iterator[Task]:
        for model in models:
            for question in effort.memory:
                yield Task(self.name, question, model)

    def measure(self, task: Task, session: Session) -> Record:
        record = Record(task, unit="byte")
        able = [peer for peer in session.peers if task.question in peer.methods()]
        unit = UNITS.get(task.model, "gradient")
        asked = {"gradient": ("torch_by_hand", unit)}
        asked |= {peer.name: (peer.__module__.rpartition(".")[2], task.question) for peer in able}
        # Nothing is timed, so that processes may run side by side; on one GPU they would share its memory.
        workers = 1 if session.device.startswith("cuda") else min(4, os.cpu_count() or 1)

        def answer(asked: tuple[str, str]) -> subprocess.CompletedProcess[str]:
            peer, question = asked
            request = {"peer": peer, "question": question, "model": task.model, "device": session.device}
            command = [sys.executable, "-m", "benchmarks.peak", json.dumps(request)]
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

        with ThreadPoolExecutor(workers) as pool:
            for label, done in zip(asked, pool.map(answer, asked.values())):
                if done.returncode:
                    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                    record.skipped[label] = said[-1]
                elif (net := json.loads(done.stdout.splitlines()[-1])) is not None:
                    record.values[label] = [float(net)]
        return record
