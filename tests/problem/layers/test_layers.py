"""Layer inputs and output deltas give the gradients of every row and column, for every kind of layer, or say why not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg import Problem, ProblemError, registry
from curvalg.problem.layers import TABLE, LayerNotes, record_layers
from tests.support.zoo import make

D = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


class Lambda(nn.Module):
    """Layers and a function of them."""

    def __init__(self, function, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def conv(layer, *shape):
    return Lambda(lambda m, x: m.layer(x).flatten(1), layer=layer), random(*shape)


def norm(layer, *shape):
    return Lambda(lambda m, x: m.layer(x).flatten(1), layer=layer), random(*shape)


def eval_norm(layer, *shape):
    layer.running_mean += 0.3
    layer.running_var += 0.5
    return norm(layer.eval(), *shape)


def param(*shape):
    return nn.Parameter(random(*shape, seed=3))


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
TOKENS = torch.randint(0, 6, (5, 4), generator=torch.Generator().manual_seed(2))
KINDS = {
    "linear": lambda: (nn.Linear(3, 2), random(5, 3)),
    "linear without bias": lambda: (nn.Linear(3, 2, bias=False), random(5, 3)),
    "linear on positions": lambda: (Lambda(lambda m, x: m.layer(x).flatten(1), layer=nn.Linear(3, 2)), random(5, 4, 3)),
    "linear on rows cut up": lambda: (
        Lambda(lambda m, x: m.layer(x.reshape(20, 3)).reshape(5, 8), layer=nn.Linear(3, 2)),
        random(5, 4, 3),
    ),
    "conv1d": lambda: conv(nn.Conv1d(2, 3, 3, stride=2, padding=1), 5, 2, 7),
    "conv2d": lambda: conv(nn.Conv2d(2, 3, (2, 3), dilation=(1, 2), padding=(1, 0)), 4, 2, 5, 7),
    "conv2d same": lambda: conv(nn.Conv2d(2, 3, (2, 3), padding="same", bias=False), 4, 2, 4, 5),
    "conv2d valid": lambda: conv(nn.Conv2d(2, 3, 2, padding="valid"), 4, 2, 4, 4),
    "conv2d reflect": lambda: conv(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 4, 2, 4, 4),
    "conv2d grouped": lambda: conv(nn.Conv2d(4, 6, 2, groups=2), 4, 4, 4, 4),
    "conv2d depthwise": lambda: conv(nn.Conv2d(3, 3, 2, groups=3, stride=2), 4, 3, 5, 5),
    "conv3d": lambda: conv(nn.Conv3d(2, 2, 2), 3, 2, 3, 3, 3),
    "conv_transpose1d": lambda: conv(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), 4, 2, 4),
    "conv_transpose2d": lambda: conv(nn.ConvTranspose2d(2, 3, (2, 3), stride=(1, 2), dilation=(2, 1)), 3, 2, 3, 3),
    "conv_transpose2d grouped": lambda: conv(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, padding=1), 3, 4, 3, 3),
    "conv_transpose3d": lambda: conv(nn.ConvTranspose3d(2, 2, 2, bias=False), 2, 2, 2, 2, 2),
    "embedding": lambda: (Lambda(lambda m, x: m.layer(x).flatten(1), layer=nn.Embedding(6, 3)), TOKENS),
    "embedding with padding": lambda: (
        Lambda(lambda m, x: m.layer(x).flatten(1), layer=nn.Embedding(6, 3, padding_idx=int(TOKENS[0, 0]))),
        TOKENS,
    ),
    "layer_norm": lambda: norm(nn.LayerNorm(4), 5, 3, 4),
    "layer_norm of two axes": lambda: norm(nn.LayerNorm((3, 4)), 5, 2, 3, 4),
    "group_norm": lambda: norm(nn.GroupNorm(2, 4), 5, 4, 3),
    "batch_norm": lambda: eval_norm(nn.BatchNorm2d(3), 5, 3, 2, 2),
    "batch_norm of vectors": lambda: eval_norm(nn.BatchNorm1d(3), 5, 3),
    "instance_norm": lambda: norm(nn.InstanceNorm1d(3, affine=True), 5, 3, 4),
    "rms_norm": lambda: norm(nn.RMSNorm(4), 5, 3, 4),
    "scale and shift": lambda: (Lambda(lambda m, x: x * m.w + m.b, w=param(3), b=param(1, 3)), random(5, 4, 3)),
    "scale of channels": lambda: (
        Lambda(lambda m, x: m.w * x - m.b, w=param(3, 1, 1), b=param(3, 1, 1)),
        random(5, 3, 2, 2),
    ),
    "scalar gate": lambda: (
        Lambda(lambda m, x: torch.add(m.b, torch.mul(x, m.w)), w=nn.Parameter(torch.tensor(0.7)), b=param(1)),
        random(5, 3),
    ),
    "positional table": lambda: (Lambda(lambda m, x: x + m.table, table=param(4, 3)), random(5, 4, 3)),
    "a matrix product": lambda: (Lambda(lambda m, x: x @ m.w, w=param(3, 2)), random(5, 3)),
    "rows on the second axis": lambda: (
        Lambda(lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1).flatten(1), layer=nn.Linear(3, 2)),
        random(5, 5, 3),
    ),
    "scaled embedding": lambda: (
        Lambda(lambda m, x: m.layer(x).flatten(1), layer=nn.Embedding(6, 3, scale_grad_by_freq=False, max_norm=100.0)),
        TOKENS,
    ),
    "bias alone is chosen": lambda: (nn.Linear(3, 2).requires_grad_(False), random(5, 3)),
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
    "numbers for every row": lambda: (Lambda(lambda m, x: x + m.w, w=param(5, 3)), random(5, 3)),
    "a function of a weight": lambda: (Lambda(lambda m, x: x @ m.w.exp(), w=param(3, 2)), random(5, 3)),
    "a product of weights": lambda: (Lambda(lambda m, x: x @ (m.v @ m.w), v=param(3, 4), w=param(4, 2)), random(5, 3)),
    "a row alone": lambda: (
        Lambda(lambda m, x: torch.stack([F.linear(row, m.w) for row in x]), w=param(2, 3)),
        random(5, 3),
    ),
    "a broadcast stack": lambda: (Lambda(lambda m, x: (x @ m.w).flatten(1), w=param(1, 3, 2)), random(5, 4, 3)),
    "packed sequences": lambda: (Lambda(packed, rnn=nn.GRU(3, 2, batch_first=True)), random(5, 4, 3)),
}
COMPOSITES = [
    "mlp",
    "cnn",
    "attention_softmax",
    "encoder_layer",
    "lstm",
    "batchnorm_eval",
    "tied_embedding",
    "sequence_classes_last",
    "sequence_classes_second",
    "two_names",
    "reused_weight",
    "frozen_and_unused",
    "inplace_activation",
    "residual",
    "several_outputs",
]


def single(name, builders):
    torch.manual_seed(0)
    model, X = builders[name]()
    model = model.to(D)
    if name == "bias alone is chosen":
        model.bias.requires_grad_(True)
    with torch.no_grad():
        rows = model(X).shape[1:]
    batches = [(X, random(len(X), *rows)), (X.flip(0), random(len(X), *rows))]
    return Problem(model, nn.MSELoss(), batches)


def check(problem, columns=3):
    """Every question of every record against Jacobian rows contracted with the cotangents."""
    J = registry.build("jacobian").lower(problem).to_dense()
    names, snapshot = problem.layout.names, problem.snapshot()
    found, at = [], 0
    with problem.differentiating():
        for evaluation in problem.evaluations(snapshot, order_matters=True):
            recorded = record_layers(evaluation)
            z = recorded.batch.output
            n, size = z.shape[0], z.numel()
            S = random(columns, *z.shape, seed=5)
            records = recorded.records(S)
            rows = J[at : at + size].reshape(n, -1, J.shape[1])
            at += size
            G = torch.einsum("nod,kno->knd", rows, S.reshape(columns, n, -1))
            assert sorted(p for r in records for p in r.params) == sorted(names)
            assert all((r.columns, r.rows) == (columns, n) for r in records)
            close(_joined(problem, [r.explicit() for r in records], 2), G)
            V, W = random(2, problem.size), random(2, columns, n)
            directions = problem.layout.unflatten_rows(V)
            close(sum(r.project(directions) for r in records), torch.einsum("pd,knd->pkn", V, G))
            close(_joined(problem, [r.combine(W) for r in records], 1), torch.einsum("pkn,knd->pd", W, G))
            close(_joined(problem, [r.squares() for r in records], 0), G.square().sum((0, 1)))
            close(torch.stack([r.square_norms() for r in records]).sum(0), G.square().sum(2))
            for record in records:
                each = record.project_each(directions)
                close(sum(each.values()), record.project(directions))
                one = record.combine_each(dict.fromkeys(record.params, W))
                assert all(torch.allclose(one[p], record.combine(W)[p], atol=1e-12) for p in record.params)
                for p in record.params:
                    alone = record.select([p])
                    close(alone.project(directions), each[p])
                    assert alone.params == (p,)
                assert record.select(["none"]) is None
            found.append((records, G))
    first, G = found[0]
    for others, H in (found[0], found[-1]):
        by = {r.params: r for r in others}
        close(sum(r.gram(by[r.params]) for r in first), torch.einsum("knd,lmd->knlm", G, H))
        parts = [p for r in first for p in r.params]
        close(
            sum(a.gram(b) for p in parts for a in [_of(first, p)] for b in [_of(others, p)]),
            torch.einsum("knd,lmd->knlm", G, H),
        )


def _of(records, param):
    return next(part for r in records if (part := r.select([param])) is not None)


def _joined(problem, dicts, lead):
    every = {name: t for d in dicts for name, t in d.items()}
    return torch.cat(
        [
            every[name].flatten(lead) if lead < every[name].ndim else every[name][..., None]
            for name in problem.layout.names
        ],
        lead,
    )


def close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 1e-10 * max(1.0, float(expected.norm()))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", KINDS)
def test_kinds(name):
    problem = single(name, KINDS)
    check(problem)
    assert problem.noted(LayerNotes).reasons == {}


@pytest.mark.parametrize("name", FALLBACKS)
def test_fallbacks_are_right_and_say_why(name):
    problem = single(name, FALLBACKS)
    check(problem)
    assert problem.noted(LayerNotes).reasons


@pytest.mark.parametrize("case", COMPOSITES)
def test_composites(case, problem_of):
    check(problem_of(case))


def test_pair_and_explicit_gram_forms_agree(inside):
    """Whichever is cheaper by count is taken; here each is forced."""

    for cost in (lambda *_: 0, lambda *_: 10**18):
        inside(pair_flops=cost)
        check(single("conv2d grouped", KINDS))
        check(single("linear on positions", KINDS))


def test_small_intermediates(inside):

    inside(record_limit=64)
    for name in ("conv2d", "linear on positions", "embedding"):
        check(single(name, KINDS))


def test_a_wrong_rule_is_noticed(monkeypatch):
    """The planted bug: a linear layer taken with a wrong input. Its parameters become explicit, with a note."""
    rule = TABLE[F.linear]

    def wrong(call):
        values = dict(call.values) | {"input": call.values["input"] + 0.1}
        return rule.use(type(call)(values, call.leaves, call.output, call.edge))

    monkeypatch.setitem(TABLE, F.linear, dataclasses.replace(rule, use=wrong))
    problem = single("linear", KINDS)
    check(problem)
    assert "do not add up" in problem.noted(LayerNotes).reasons["weight"]
    alone = Problem(
        torch.nn.Linear(4, 3, bias=False).double(),
        torch.nn.MSELoss(),
        (torch.randn(5, 4).double(), torch.randn(5, 3).double()),
    )
    check(alone)
    assert "do not add up" in alone.noted(LayerNotes).reasons["weight"]


def test_batch_statistics_are_refused(problem_of):
    problem = problem_of("batchnorm_training")
    with problem.differentiating(), pytest.raises(ProblemError, match="batch statistics"):
        record_layers(next(iter(problem.evaluations(problem.snapshot()))))


def test_nothing_of_the_model_changes():
    case = make("encoder_layer")
    before = {name: t.clone() for name, t in case.model.state_dict().items()}
    check(Problem(case.model, case.loss, case.batches))
    assert all(torch.equal(t, before[name]) for name, t in case.model.state_dict().items())
    assert all(p.grad is None for p in case.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())
    assert type(torch.ones(1) + 1) is torch.Tensor


def test_a_plugin_sees_the_layers(problem_of):
    problem = problem_of("cnn")
    with problem.differentiating():
        for evaluation in problem.evaluations(problem.snapshot()):
            batch = evaluation.evaluate()
            for record in batch.layers(batch.row_factor()):
                assert record.name in record.params[0]
                assert record.module is not None
                assert record.inputs.shape[-3:-2] == (batch.output.shape[0],)
                assert record.nbytes > 0


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
