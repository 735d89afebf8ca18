"""BackPACK, for the diagonal of the GGN."""

from __future__ import annotations

import copy

import torch
from backpack import backpack, extend
from backpack.extensions import DiagGGNExact
from torch import Tensor, nn

from benchmarks.peers.base import Peer, Run, answers
from benchmarks.workload import Workload


class BackPACK(Peer):
    """It extends modules in place, and knows sequences of layers only."""

    name = "backpack"
    distribution = "backpack-for-pytorch"

    @answers("ggn diagonal")
    def diagonal(self, workload: Workload, question: str) -> Run | None:
        """Of one batch."""
        if not isinstance(workload.model, nn.Sequential) or len(workload.data) > 1:
            return None
        ((X, y),) = workload.data
        model, loss = extend(workload.twin()), extend(copy.deepcopy(workload.loss))

        def run() -> Tensor:
            with backpack(DiagGGNExact()):
                loss(model(X), y).backward()
            diagonal = torch.cat([p.diag_ggn_exact.reshape(-1) for p in model.parameters()])
            model.zero_grad()
            return diagonal

        return run
