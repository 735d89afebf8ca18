"""Layer inputs and output deltas give the gradients of every row and column, for every kind of layer, or say why not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg import Problem, ProblemError
from curvalg.problem.layers import TABLE, LayerNotes, record_layers
from tests.support.layers import TOKENS, Lambda, check, param, random, single
from tests.support.zoo import make


def conv(layer, *shape):
    return Lambda(lambda m, x: m.layer(x).flatten(1), layer=layer), random(*shape)


def norm(layer, *shape):
    return Lambda(lambda m, x: m.layer(x).flatten(1), layer=layer), random(*shape)


def eval_norm(layer, *shape):
    layer.running_mean += 0.3
    layer.running_var += 0.5
    return norm(layer.eval(), *shape)


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
}
FALLBACKS = {
    "numbers for every row": lambda: (Lambda(lambda m, x: x + m.w, w=param(5, 3)), random(5, 3)),
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
