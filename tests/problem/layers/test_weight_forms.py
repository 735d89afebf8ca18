"""Weights that are arranged, packed, contracted or used by steps have inputs and deltas; what has none says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg import Problem
from curvalg.problem.layers import LayerNotes
from tests.support.layers import TOKENS, D, Lambda, check, param, random, single


def recurrent(layer):
    return Lambda(lambda m, x: torch.cat([part.flatten(1) for part in outputs(m.rnn(x))], 1), rnn=layer), random(
        5, 4, 3
    )


def outputs(found):
    """The output of a recurrent network, and its last states with rows first."""
    output, last = found
    return [output, *(part.transpose(0, 1) for part in (last if isinstance(last, tuple) else (last,)))]


def cells(m, x):
    h, c = m.lstm(x)
    return m.rnn(m.gru(h, c), x)


def packed(m, x):
    sequences = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 4, 3, 2, 1]), batch_first=True)
    return m.rnn(sequences)[1][0]


def attention(function, **options):
    layer = nn.MultiheadAttention(4, 2, batch_first=True, **options)
    return Lambda(lambda m, x: function(m.attend, x)[0].flatten(1), attend=layer), random(5, 3, 4)


def positions(count, arrange):
    table = nn.Embedding(7, 3)
    return Lambda(lambda m, x: (x + arrange(m.table(torch.arange(count)))).tanh().flatten(1), table=table), random(
        5, count, 3
    )


OFFSETS = torch.tensor([[0, 1, 2], [3, 0, 1], [2, 3, 0]])
MASK = torch.tensor([[0.0, -1, -2], [0, 0, -1], [0, 0, 0]], dtype=D)
FORMS = {
    "a slice of a table": lambda: (Lambda(lambda m, x: x + m.table[:4], table=param(6, 3)), random(5, 4, 3)),
    "a transposed weight": lambda: (Lambda(lambda m, x: x @ m.w.T, w=param(2, 3)), random(5, 3)),
    "a weight on the left": lambda: (Lambda(lambda m, x: (m.w @ x).flatten(1), w=param(2, 3)), random(5, 3, 4)),
    "a weight from single numbers": lambda: (
        Lambda(lambda m, x: x @ m.w.float().double().view(3, 2).contiguous(), w=param(6)),
        random(5, 3),
    ),
    "einsum": lambda: (
        Lambda(lambda m, x: torch.einsum("nti,oi->nto", x, m.w).flatten(1), w=param(2, 3)),
        random(5, 4, 3),
    ),
    "einsum of heads": lambda: (
        Lambda(lambda m, x: torch.einsum("...thd,hod->...tho", x, m.w).flatten(1), w=param(2, 4, 3)),
        random(5, 3, 2, 3),
    ),
    "stacks of matrices": lambda: (
        Lambda(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1).flatten(1), w=param(2, 3, 4)),
        random(5, 2, 3),
    ),
    "packed projections": lambda: (
        Lambda(
            lambda m, x: torch.cat(
                [F.linear(t, w, b) for t, w, b in zip((x, x * x, x.exp()), m.w.chunk(3), m.b.chunk(3), strict=True)], 1
            ),
            w=param(6, 3),
            b=param(6),
        ),
        random(5, 3),
    ),
    "overlapping parts": lambda: (
        Lambda(lambda m, x: torch.cat([x @ m.w[:3], (x * x) @ m.w[1:]], 1), w=param(4, 3)),
        random(5, 3),
    ),
    "the same part twice": lambda: (Lambda(lambda m, x: x @ m.w[[0, 0, 1]], w=param(2, 3)), random(5, 3)),
    "a token for every row": lambda: (
        Lambda(lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1).tanh().flatten(1), token=param(1, 1, 3)),
        random(5, 2, 3),
    ),
    "a repeated token": lambda: (
        Lambda(lambda m, x: torch.cat([m.token.repeat(len(x), 1, 1), x], 1).tanh().flatten(1), token=param(1, 1, 3)),
        random(5, 2, 3),
    ),
    "embedded positions": lambda: positions(4, lambda picked: picked),
    "as many embedded positions as rows": lambda: positions(5, lambda picked: picked),
    "embedded positions in a batch of one": lambda: positions(4, lambda picked: picked[None]),
    "relative positions": lambda: (
        Lambda(
            lambda m, x: (x + (m.table(OFFSETS).permute(2, 0, 1).unsqueeze(0) + MASK)).tanh().flatten(1),
            table=nn.Embedding(4, 2),
        ),
        random(5, 2, 3, 3),
    ),
    "picked rows": lambda: (Lambda(lambda m, x: m.table[x].flatten(1), table=param(6, 3)), TOKENS),
    "embedding and head": lambda: (
        Lambda(lambda m, x: F.linear(m.table(x).tanh(), m.table.weight).flatten(1), table=nn.Embedding(6, 3)),
        TOKENS,
    ),
    "rnn": lambda: recurrent(nn.RNN(3, 2, batch_first=True)),
    "rnn with relu": lambda: recurrent(nn.RNN(3, 2, nonlinearity="relu", bias=False, batch_first=True)),
    "lstm": lambda: recurrent(nn.LSTM(3, 2, batch_first=True)),
    "deep lstm in both directions": lambda: recurrent(nn.LSTM(3, 2, 2, bidirectional=True, batch_first=True)),
    "lstm with projections": lambda: recurrent(nn.LSTM(3, 4, 2, proj_size=2, batch_first=True)),
    "gru": lambda: recurrent(nn.GRU(3, 2, 2, batch_first=True)),
    "gru in both directions": lambda: recurrent(nn.GRU(3, 2, bidirectional=True, bias=False, batch_first=True)),
    "steps first": lambda: (
        Lambda(lambda m, x: m.rnn(x.transpose(0, 1))[0].transpose(0, 1).flatten(1), rnn=nn.GRU(3, 2)),
        random(5, 4, 3),
    ),
    "cells": lambda: (Lambda(cells, lstm=nn.LSTMCell(3, 2), gru=nn.GRUCell(2, 2), rnn=nn.RNNCell(2, 3)), random(5, 3)),
    "attention": lambda: attention(lambda m, x: m(x, x, x)),
    "attention of others": lambda: attention(lambda m, x: m(x, x * x, x.exp())),
    "attention with other widths": lambda: attention(
        lambda m, x: m(x, x[..., :3], x[..., :2]), kdim=3, vdim=2, add_bias_kv=False
    ),
    "attention with weights": lambda: attention(
        lambda m, x: (sum(m(x, x, x, average_attn_weights=False)[1].unbind(1)),)
    ),
    "attention with masks": lambda: attention(
        lambda m, x: m(x, x, x, attn_mask=torch.ones(3, 3).triu(1).bool(), key_padding_mask=x[:, :, 0] > 5)
    ),
    "attention with a float mask": lambda: attention(lambda m, x: m(x, x, x, attn_mask=random(10, 3, 3))),
    "attention with biases of keys": lambda: attention(lambda m, x: m(x, x, x), add_bias_kv=True, add_zero_attn=True),
    "attention with steps first": lambda: (
        Lambda(
            lambda m, x: m.attend(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1).flatten(1),
            attend=nn.MultiheadAttention(4, 2, bias=False),
        ),
        random(5, 3, 4),
    ),
}
FALLBACKS = {
    "a function of a weight": lambda: (Lambda(lambda m, x: x @ m.w.exp(), w=param(3, 2)), random(5, 3)),
    "a product of weights": lambda: (Lambda(lambda m, x: x @ (m.v @ m.w), v=param(3, 4), w=param(4, 2)), random(5, 3)),
    "a row alone": lambda: (
        Lambda(lambda m, x: torch.stack([F.linear(row, m.w) for row in x]), w=param(2, 3)),
        random(5, 3),
    ),
    "a broadcast stack": lambda: (Lambda(lambda m, x: (x @ m.w).flatten(1), w=param(1, 3, 2)), random(5, 4, 3)),
    "packed sequences": lambda: (Lambda(packed, rnn=nn.GRU(3, 2, batch_first=True)), random(5, 4, 3)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_weights(name):
    problem = single(name, FORMS)
    check(problem)
    assert problem.noted(LayerNotes).reasons == {}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_is_no_linear_layer_says_why(name):
    problem = single(name, FALLBACKS)
    check(problem)
    assert problem.noted(LayerNotes).reasons


def tokens(mixed=True):
    """A model that flattens the tokens of a sequence to rows, before its layers and in its output."""

    def forward(m, x):
        h = m.first(m.table(x).flatten(0, 1)).tanh().unflatten(0, x.shape)
        h = h.cumsum(1) if mixed else h
        return m.last(m.norm(h).reshape(-1, 3))

    torch.manual_seed(0)
    return Lambda(
        forward, table=nn.Embedding(6, 3), first=nn.Linear(3, 3), norm=nn.LayerNorm(3), last=nn.Linear(3, 2)
    ).to(D)


@pytest.mark.parametrize("mixed", [True, False])
def test_tokens_that_are_rows_of_the_output(mixed):
    """Where tokens see each other, those of a sequence are computed together, and each has a gradient of its own."""
    data = [(TOKENS[:3], random(12, 2)), (TOKENS[:, :2], random(10, 2, seed=1))]
    problem = Problem(tokens(mixed), nn.MSELoss(), data)
    check(problem)
    notes = problem.noted(LayerNotes)
    assert notes.reasons == {} and bool(notes.folded) == mixed


def test_rows_that_are_shuffled_are_no_groups():
    """Twice as many rows as sequences, but which belong together depends on the data."""
    torch.manual_seed(0)

    def forward(m, x):
        h = m.first(x)
        h = torch.cat([h, h.roll(1, 0)]).cumsum(0)
        return m.last(h)

    model = Lambda(forward, first=nn.Linear(3, 3), last=nn.Linear(3, 2)).to(D)
    problem = Problem(model, nn.MSELoss(), (random(4, 3), random(8, 2, seed=1)))
    check(problem)
    assert "first.weight" in problem.noted(LayerNotes).reasons


def test_parts_of_rows_in_any_order():
    """Rows of different lengths are laid one after the other and summed up again, as nodes of graphs."""
    owner = torch.tensor([2, 0, 0, 1, 2, 2, 4, 3, 4, 1])
    kinds = torch.tensor([0, 1, 2, 3, 0, 1, 5, 4, 2, 2])

    def forward(m, x):
        h = (m.table(kinds) + x[owner] @ m.weight + m.bias) * m.scale
        return torch.zeros(5, 2, dtype=D).index_add(0, owner, m.last(h.tanh()))

    torch.manual_seed(0)
    model = Lambda(
        forward,
        table=nn.Embedding(6, 3),
        weight=param(3, 3),
        bias=param(3),
        scale=param(1, 3),
        last=nn.Linear(3, 2),
    ).to(D)
    problem = Problem(model, nn.MSELoss(), (random(5, 3), random(5, 2, seed=1)))
    check(problem)
    assert problem.noted(LayerNotes).reasons == {}


def single_precision(m, x):
    """A norm in float32 inside a float64 model, as libraries write it."""
    h = m.first(x).float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).double() * m.scale


@pytest.mark.parametrize("mixed", [True, False])
def test_a_model_that_rounds_more_than_its_parameters_keeps_its_layers(mixed):
    def forward(m, x):
        h = single_precision(m, x)
        return m.last((h.cumsum(1) if mixed else h).tanh()).flatten(1)

    torch.manual_seed(0)
    model = Lambda(forward, first=nn.Linear(3, 4), scale=param(4), last=nn.Linear(4, 2)).to(D)
    problem = Problem(model, nn.MSELoss(), (random(5, 3, 3), random(5, 6, seed=1)))
    with problem.batches() as batches:
        records = list(next(iter(batches)).layers(random(2, 5, 6)))
    notes = problem.noted(LayerNotes)
    assert notes.reasons == {} and 1e-9 < notes.noise < 1e-5
    assert {record.kind for record in records} == {"dense", "scale"}


def test_rows_that_are_misplaced_are_found_however_the_model_rounds():
    def forward(m, x):
        h = single_precision(m, x)
        return m.last(torch.stack([h, h.flip(0)], 1).cumsum(1).tanh()).flatten(1)

    torch.manual_seed(0)
    model = Lambda(forward, first=nn.Linear(3, 4), scale=param(4), last=nn.Linear(4, 2)).to(D)
    problem = Problem(model, nn.MSELoss(), (random(5, 3), random(5, 4, seed=1)))
    with problem.batches() as batches:
        list(next(iter(batches)).layers(random(2, 5, 4)))
    assert set(problem.noted(LayerNotes).reasons) == {"first.weight", "first.bias", "scale"}


@pytest.mark.parametrize("first", [0, 1])
def test_embedded_positions_in_batches_of_several_rows_and_of_one(first):
    """In a batch of one row the picked rows have the shape of what they are added to."""
    model, X = positions(4, lambda picked: picked[None])
    batches = [(X[:3], random(3, 12)), (X[3:4], random(1, 12, seed=1))]
    check(Problem(model.to(D), nn.MSELoss(), batches if not first else batches[::-1]))
