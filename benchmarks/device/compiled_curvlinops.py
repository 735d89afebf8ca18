"""curvlinops around a compiled model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from benchmarks.peers.base import Run, answers
from benchmarks.peers.curvlinops import PRODUCTS, Curvlinops
from benchmarks.workload import Workload


class CompiledCurvlinops(Curvlinops):
    """Its operators differentiate through ``torch.compile``, where that can be differentiated."""

    name = "curvlinops, compiled"

    @answers(*PRODUCTS)
    def product(self, workload: Workload, question: str) -> Run:
        """Compiled in the first product, which is not in the time."""
        model: Any = torch.compile(workload.twin())
        compiled = dataclasses.replace(workload, model=model)
        return super().product(compiled, question)
