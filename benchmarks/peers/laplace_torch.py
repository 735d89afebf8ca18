"""laplace-torch, for what a posterior answers; in its KFAC a bias has a block of its own."""

from __future__ import annotations

import warnings

import torch
from laplace import Laplace
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.base import Peer, Run, answers
from benchmarks.workload import DRAWS, Workload


class LaplaceTorch(Peer):
    """By its default backend."""

    name = "laplace-torch"
    distribution = "laplace-torch"
    only = ("posteriors",)

    @answers("functional variance", "posterior draws")
    def posterior(self, workload: Workload, question: str) -> Run | None:
        """Of models whose parameters are all of linear layers and convolutions, one label for each row."""
        X, y = (torch.cat(parts) for parts in zip(*workload.data, strict=True))
        if len(workload.affine) < len(workload.parameters) or y.ndim > 1:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is deprecated in torch since
            made = Laplace(workload.twin(), "classification", subset_of_weights="all", hessian_structure="kron")
            made.fit(DataLoader(TensorDataset(X, y), batch_size=len(X)))
        asked = X[: workload.sizes.asked]

        def variance() -> Tensor:
            found: Tensor = made._glm_predictive_distribution(asked)[1]
            return found

        def draws() -> Tensor:
            found: Tensor = made.sample(DRAWS).var(0).sum()
            return found

        return variance if question == "functional variance" else draws
