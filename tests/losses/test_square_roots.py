"""Square roots of the blocks of a loss, where eigenvalues fail to converge."""

from __future__ import annotations

import pytest
import torch

from curvalg.errors import LossError
from curvalg.losses import CallableLoss
from curvalg.losses.output_blocks import square_roots
from tests.support.outputs import Y, Z


@pytest.mark.parametrize("failure", ["raises", "gives NaN"])
def test_square_roots_are_retried_in_float64(failure, monkeypatch):
    eigh, blocks = torch.linalg.eigh, torch.stack([Z[:3].float(), Z[3:].float()])
    blocks = blocks @ blocks.mT

    def unreliable(matrix):
        if matrix.dtype == torch.float64:
            return eigh(matrix)
        if failure == "raises":
            raise torch.linalg.LinAlgError("did not converge")
        values, vectors = eigh(matrix)
        return values, vectors * torch.nan

    monkeypatch.setattr(torch.linalg, "eigh", unreliable)
    columns = square_roots("loss", blocks)
    assert columns.dtype == torch.float32
    assert torch.allclose(columns @ columns.mT, blocks, atol=1e-5)


def test_square_roots_of_what_is_not_finite_are_refused():
    with pytest.raises(LossError, match="loss: the Hessian in the output has NaN"):
        square_roots("loss", torch.full((1, 2, 2), torch.nan))
    with pytest.raises(LossError, match="NaN"):
        CallableLoss(lambda z, y: z.abs().sqrt().sum(), reduction="sum").at(torch.zeros(2, 1), Y[:2]).factor()
