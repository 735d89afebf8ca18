"""A pretrained model that is sure of its labels, in float32: the largest eigenvalues of the GGN by both routes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator

from curvalg import Problem, estimate, registry


def inputs(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


@pytest.mark.parametrize("scale", [300.0, 3000.0])
def test_the_largest_eigenvalues_converge_by_default(scale):
    from tests.support.models.zoo import minilm

    pretrained, batches = minilm(), []  # one of its own: it is changed
    model = pretrained.model.float().eval()
    with torch.no_grad():
        model.classifier.weight.mul_(scale)
        for batch in pretrained.batches:
            batches.append({**batch, "labels": model(**inputs(batch)).logits.argmax(1)})
    problem = Problem(
        model,
        F.cross_entropy,
        batches,
        forward=lambda net, batch: net(**inputs(batch)).logits,
        target=lambda batch: batch["labels"],
    )
    assert problem.value() < 0.05
    op = registry.build("ggn").lower(problem)
    exact = estimate.eigsh(op, 3)
    assert exact.converged
    assert exact.method == "exact"
    products = LinearOperator(op.shape, matvec=op.matvec, matmat=op.matmat, rmatvec=op.matvec, dtype=op.dtype)
    lanczos = estimate.eigsh(products, 3)
    assert lanczos.converged
    assert lanczos.method == "lanczos"
    error = (lanczos.eigenvalues - exact.eigenvalues).abs().max()
    assert float(error) <= 1e-4 * float(exact.eigenvalues.max())
