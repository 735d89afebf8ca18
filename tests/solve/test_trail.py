"""Marks of a solve: whatever the tensors lie like in memory, going on from one gives the same bits."""

from __future__ import annotations

import pytest
import torch

from curvalg.solve import Mark, Trail, cg, minres


@pytest.mark.parametrize("method", [cg, minres])
def test_a_mark_that_was_written_to_a_file(method):
    generator = torch.Generator().manual_seed(0)
    n = 1000
    A = torch.randn(n, n, generator=generator)
    A = A @ A.T / n + 0.1 * torch.eye(n)
    b = torch.randn(n, 3, generator=generator)
    scale = 1 + torch.rand(n, 1, generator=generator)
    marks: list[Mark] = []

    class Keeping(Trail):
        def mark(self, mark: Mark) -> None:
            marks.append(mark)

    def lying_across(r):
        return (scale * r).T.contiguous().T

    options = {"preconditioner": lying_across, "rtol": 1e-5, "maxiter": 200}
    whole = method(lambda x: A @ x, b, trail=Keeping(), **options)
    for mark in (marks[3], marks[len(marks) // 2], marks[-1]):
        read = Mark({k: t.contiguous() for k, t in mark.tensors.items()}, mark.numbers, mark.history, mark.length)
        resumed = method(lambda x: A @ x, b, trail=Trail(read), **options)
        assert torch.equal(resumed.x, whole.x) and torch.equal(resumed.history, whole.history)
