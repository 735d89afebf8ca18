"""curvlinops, with its products compiled."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.base import Run, answers
from benchmarks.peers.curvlinops import PRODUCTS, Curvlinops
from benchmarks.workload import Workload

UNCOMPILED = "tiny"
"""The model on which libraries are made warm: compiling for it takes as long as for any other."""


class CompiledCurvlinops(Curvlinops):
    """``torch.compile`` of the whole product.

    Of the model alone it would do nothing: inside of ``torch.func``, which curvlinops differentiates by, a compiled model runs
    as it was.
    """

    name = "curvlinops, compiled"

    @answers(*PRODUCTS)
    def product(self, workload: Workload, question: str) -> Run | None:
        """Compiled here, which is not in the time."""
        if workload.name == UNCOMPILED:
            return None
        compiled: Any = torch.compile(super().product(workload, question))
        compiled()
        run: Run = compiled
        return run
