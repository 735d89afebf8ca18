"""kronfluence, for influence scores in the eigenbasis of EKFAC: of losses that are sums, so N times the scores of a mean."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.peers.base import Peer, Run, answers
from benchmarks.workload import Workload


class OwnLosses(Task):  # type: ignore[misc]  # an untyped library
    """Losses of a batch, added."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """The sum; true labels serve for the empirical Fisher."""
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The same for a query."""
        return self.compute_train_loss(batch, model)


class Kronfluence(Peer):
    """Scores go through files in a folder, as its users get them."""

    name = "kronfluence"
    distribution = "kronfluence"
    only = ("attribution",)

    @answers("influence scores", "self influence")
    def scores(self, workload: Workload, question: str) -> Run | None:
        """Of models whose parameters are all of linear layers and convolutions, one label for each row."""
        X, y = (torch.cat(parts) for parts in zip(*workload.data, strict=True))
        if len(workload.affine) < len(workload.parameters) or y.ndim > 1:
            return None
        folder, task, rows = tempfile.TemporaryDirectory(), OwnLosses(), len(X)
        workload.closing.callback(folder.cleanup)
        model = prepare_model(workload.twin(), task)
        cpu = X.device.type == "cpu"
        made = Analyzer("run", model, task, cpu=cpu, output_dir=folder.name, disable_tqdm=True)
        data, queries = TensorDataset(X, y), TensorDataset(X[: workload.sizes.queries], y[: workload.sizes.queries])
        size, options = -(-rows // len(workload.data)), ScoreArguments(damping_factor=workload.sizes.damping)
        factors = FactorArguments("ekfac", use_empirical_fisher=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is deprecated in torch since
            made.fit_all_factors("factors", data, factor_args=factors, per_device_batch_size=size)

        def pairwise() -> Tensor:
            made.compute_pairwise_scores(
                "scores",
                "factors",
                queries,
                data,
                len(queries),
                per_device_train_batch_size=size,
                score_args=options,
                overwrite_output_dir=True,
            )
            found: Tensor = made.load_pairwise_scores("scores")["all_modules"]
            return found / rows

        def own() -> Tensor:
            made.compute_self_scores(
                "own", "factors", data, per_device_train_batch_size=size, score_args=options, overwrite_output_dir=True
            )
            found: Tensor = made.load_self_scores("own")["all_modules"]
            return found / rows

        return pairwise if question == "influence scores" else own
