"""hessian-eigenthings (1.0): vectors only, nothing kept between products."""

from __future__ import annotations

from typing import Any

import torch
from hessian_eigenthings import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    lanczos,
    spectral_density,
    supervised_forward,
    supervised_loss,
    supervised_loss_of_output,
    trace,
)
from torch import Tensor, nn

from benchmarks.peers.base import Difference, Peer, Run, answers, looped
from benchmarks.workload import Workload

STEPS = 16
"""Lanczos steps for each eigenvalue: what the ten largest of the large MLP need to be right to about a per cent."""


class HessianEigenthings(Peer):
    """By its operators; batches are averaged, which is the mean over samples only where all are of one size."""

    name = "hessian-eigenthings"
    distribution = "hessian-eigenthings"
    many_columns = False
    differs = (
        Difference(
            "eigenvalues",
            "a given number of Lanczos steps without restarts, here sixteen for each eigenvalue; residuals are not bounded",
        ),
    )

    def operator(self, term: str, workload: Workload) -> Any:
        """Its operator for one of the matrices."""
        loss = workload.loss
        makers = {
            "hessian": lambda: HessianOperator(workload.model, workload.data, supervised_loss(loss)),
            "ggn": lambda: GGNOperator(
                workload.model, workload.data, supervised_forward, supervised_loss_of_output(loss)
            ),
            "covariance": lambda: EmpiricalFisherOperator(workload.model, workload.data, self._loss_of_sample(loss)),
        }
        return makers[term]()

    @answers("hessian", "ggn", "covariance")
    def product(self, workload: Workload, question: str) -> Run:
        """Column by column."""
        op = self.operator(question, workload)
        return lambda: looped(op.matvec, workload.vectors)

    @answers("eigenvalues")
    def eigenvalues(self, workload: Workload, question: str) -> Run:
        """By Lanczos with full re-orthogonalisation."""
        sizes = workload.sizes

        def run() -> Tensor:
            found = lanczos(
                self.operator("hessian", workload),
                k=sizes.eigenvalues,
                max_iter=min(STEPS * sizes.eigenvalues, workload.size - 1),
                tol=sizes.tol,
                reorthogonalize=True,
                which="LA",
                seed=0,
            )
            values: Tensor = found.eigenvalues
            return values

        return run

    @answers("density")
    def density(self, workload: Workload, question: str) -> Run:
        """The second moment of the nodes."""
        sizes = workload.sizes

        def run() -> Tensor:
            op = self.operator("hessian", workload)
            found = spectral_density(op, num_runs=sizes.probes, lanczos_steps=sizes.steps, seed=0)
            moment: Tensor = (found.raw_weights * found.raw_eigenvalues.nan_to_num() ** 2).sum(1).mean()
            return moment

        return run

    @answers("trace ggn", "trace hessian")
    def trace(self, workload: Workload, question: str) -> Run:
        """By Hutch++, its default."""
        term = question.split()[1]

        def run() -> Tensor:
            found = trace(self.operator(term, workload), num_matvecs=workload.sizes.products, seed=0)
            return torch.tensor(found.estimate)

        return run

    @staticmethod
    def _loss_of_sample(loss: nn.Module) -> Any:
        # Their own helper strips the batch axis, which makes classes of a sequence look like a batch.
        def of(model: nn.Module, sample: tuple[Tensor, Tensor]) -> Any:
            return loss(model(sample[0][None]), sample[1][None])

        return of
