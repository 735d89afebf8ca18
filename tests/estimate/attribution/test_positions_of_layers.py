"""Scores by position where layers, or rows, have different numbers of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Identity, Problem, ProblemError
from curvalg.estimate import influence, influence_stream
from tests.support.scored import MATRICES, close, gradients, images, random, words


@pytest.mark.parametrize("matrix", ["ekfac", "cg"])
def test_positions_of_several_kinds_are_by_layer(matrix):
    """Convolutions see places, and a head the whole: gradients of a kernel with its deltas elsewhere zero."""
    net, loss, data = images()
    train, test = data(6, 1), data(4, 2)
    problem, queries = (
        Problem(net, loss, [tuple(t[:4] for t in train), tuple(t[4:] for t in train)]),
        Problem(net, loss, test),
    )
    op = MATRICES[matrix]().lower(problem)
    found = influence(op, queries, by="position", query_batch=3).scores
    assert {name: tuple(t.shape) for name, t in found.items()} == {"0": (4, 6, 16), "2": (4, 6, 4), "4": (4, 6, 1)}
    by_layer = influence(op, queries, by="layer", query_batch=3).scores
    for name, scores in by_layer.items():
        close(found[name].sum(2), scores)
    close(sum(t.sum(2) for t in found.values()), influence(op, queries).scores)
    for part in influence_stream(op, queries, by="position", query_batch=3):
        for name, scores in part.scores.items():
            close(scores, found[name][part.queries, part.samples])
    z = net[0](train[0]).detach().requires_grad_()
    (delta,) = torch.autograd.grad(loss(net[1:](z), train[1]), z)
    product = (op @ gradients(net, loss, *test, 1.0).T).T
    weight, bias = (product[:, problem.layout.slices[f"0.{kind}"]] for kind in ("weight", "bias"))
    tangents = torch.stack(
        [nn.functional.conv2d(train[0], w.reshape(4, 2, 3, 3), b) for w, b in zip(weight, bias, strict=True)]
    )
    close(found["0"], (tangents * delta).sum(2).flatten(2))


class Twice(nn.Module):
    """One module with two weights of its own, at all places and at their mean."""

    def __init__(self):
        super().__init__()
        self.each, self.mean = (nn.Parameter(random(3, 3, seed=s)) for s in (1, 2))

    def forward(self, x):
        return torch.tanh(x @ self.each).mean(1) @ self.mean


def test_positions_within_a_layer_are_not_mixed_up():
    problem = Problem(Twice(), nn.CrossEntropyLoss(), (random(5, 4, 3), torch.arange(5) % 3))
    op = (1.0 * Identity).lower(problem)
    with pytest.raises(ProblemError, match=r"parameters of the root are used at [14] and at [14] positions"):
        influence(op, by="position")
    assert influence(op, by="layer").scores[""].shape == (5, 5)


def test_rows_of_different_lengths_have_no_table_of_positions():
    net, loss, _ = words()
    batches = [(w[:, :-1], w[:, 1:]) for w in (torch.arange(12).reshape(2, 6) % 7, torch.arange(8).reshape(2, 4) % 7)]
    op = (1.0 * Identity).lower(Problem(net, loss, batches))
    with pytest.raises(ProblemError, match="rows of different numbers of positions; pad them"):
        influence(op, by="position")
    shapes = [part.scores.shape for part in influence_stream(op, by="position")]
    assert shapes == [(4, 2, 5), (4, 2, 3)]
