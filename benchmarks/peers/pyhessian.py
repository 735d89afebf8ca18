"""PyHessian (0.1): Hessians alone, vectors only; on one batch the graph of the gradient is kept between products."""

from __future__ import annotations

from typing import Any

import torch
from pyhessian import hessian
from pyhessian.utils import hessian_vector_product
from torch import Tensor

from benchmarks.peers.base import Difference, Peer, Run, answers, looped
from benchmarks.workload import Workload


class PyHessian(Peer):
    """It writes gradients into the model. Its spectral density calls ``torch.eig``, which torch has no more: left out."""

    name = "pyhessian"
    distribution = "pyhessian"
    many_columns = False
    differs = (
        Difference(
            "eigenvalues",
            "power iteration with deflation for the largest in modulus; stops when an estimate changes little",
        ),
    )

    def computation(self, workload: Workload) -> Any:
        """Its central object."""
        cuda = workload.vectors.is_cuda
        if len(workload.data) == 1:
            return hessian(workload.twin(), workload.loss, data=workload.data[0], cuda=cuda)
        return hessian(workload.twin(), workload.loss, dataloader=workload.data, cuda=cuda)

    @answers("hessian")
    def product(self, workload: Workload, question: str) -> Run:
        """By what its own estimators call."""
        it = self.computation(workload)
        shapes = [p.shape for p in it.params]
        sizes = [p.numel() for p in it.params]

        def multiply(v: Tensor) -> Tensor:
            parts = [part.reshape(shape) for part, shape in zip(v.split(sizes), shapes)]
            if it.full_dataset:
                _, product = it.dataloader_hv_product(parts)
            else:
                product = hessian_vector_product(it.gradsH, it.params, parts)
            return torch.cat([part.reshape(-1) for part in product])

        return lambda: looped(multiply, workload.vectors)

    @answers("eigenvalues")
    def eigenvalues(self, workload: Workload, question: str) -> Run:
        """At most 100 products for each."""
        sizes = workload.sizes

        def run() -> Tensor:
            found, _ = self.computation(workload).eigenvalues(tol=sizes.tol, top_n=sizes.eigenvalues)
            return torch.tensor(found).sort(descending=True).values

        return run

    @answers("trace hessian")
    def trace(self, workload: Workload, question: str) -> Run:
        """By Hutchinson's estimator, without stopping early."""

        def run() -> Tensor:
            found = self.computation(workload).trace(maxIter=workload.sizes.products, tol=0.0)
            return torch.tensor(float(sum(found) / len(found)))

        return run
