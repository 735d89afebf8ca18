"""Agreement with curvlinops where both define the matrix."""

from __future__ import annotations

import curvlinops
import numpy as np
import pytest
import torch
from torch import nn

from curvalg import Problem, registry
from tests.support.zoo import make

PEERS = {
    "hessian": curvlinops.HessianLinearOperator,
    "ggn": curvlinops.GGNLinearOperator,
    "covariance": curvlinops.EFLinearOperator,
}


@pytest.mark.parametrize("model", ["mlp", "cnn", "linear", "attention_softmax", "batchnorm_eval"])
@pytest.mark.parametrize("term", PEERS)
def test_agrees_with_curvlinops(term, model, vectors):
    case = make(model)
    ours = registry.build(term).lower(Problem(case.model, case.loss, case.batches))
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    theirs = PEERS[term](case.model, case.loss, parameters, case.batches)
    V = vectors(ours.shape[1])
    got = ours @ V
    expected = theirs @ V
    if term == "covariance" and isinstance(case.loss, nn.MSELoss):
        # Their mean is over elements: each of the n samples weighs 1/(n·C)² · n·C, ours 1/(n·C)² · n.
        expected = expected / case.batches[0][1].shape[1]
    assert (got - expected).norm() <= 1e-10 * expected.norm()


def test_their_sum_of_losses_too(vectors):
    case = make("mlp")
    loss = nn.CrossEntropyLoss(reduction="sum")
    ours = registry.build("hessian").lower(Problem(case.model, loss, case.batches))
    theirs = curvlinops.HessianLinearOperator(case.model, loss, list(case.model.parameters()), case.batches)
    V = vectors(ours.shape[1])
    np.testing.assert_allclose((ours @ V).numpy(), (theirs @ V).numpy(), rtol=1e-9, atol=1e-11)
    assert isinstance(ours @ V, torch.Tensor)
