"""Class weights, label smoothing and their like: counted, or refused by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvalg import CurvalgWarning, LossError, Problem
from tests.support.field.data import (
    PAIRS,
    UNIT,
    N,
    Net,
    R,
    X,
    Y,
    ce,
    draws,
    lower,
)

SOFT = torch.rand(N, 3, generator=draws).double().softmax(1)
W = torch.tensor([0.5, 2.0, 1.0]).double()


PW = torch.tensor([1.0, 3.0, 0.5]).double()


def soft_ce(z, q, w=None, eps=0.0):
    q = (1 - eps) * q + eps / 3
    return -((q if w is None else w * q) * F.log_softmax(z, 1)).sum(1)


def bce(z, y, **options):
    return F.binary_cross_entropy_with_logits(z, y, reduction="none", **options).sum(1)


OPTIONS = {
    "class weights": (nn.CrossEntropyLoss(W), Y, partial(ce, weight=W), float(W[Y].sum())),
    "class weights of a function": (partial(F.cross_entropy, weight=W), Y, partial(ce, weight=W), float(W[Y].sum())),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), Y, partial(ce, label_smoothing=0.2), 7.0),
    "weights and smoothing": (
        nn.CrossEntropyLoss(W, label_smoothing=0.2), Y, partial(ce, weight=W, label_smoothing=0.2), float(W[Y].sum()),
    ),
    "soft labels": (nn.CrossEntropyLoss(), SOFT, soft_ce, 7.0),
    "soft labels, weights, smoothing": (
        nn.CrossEntropyLoss(W, label_smoothing=0.1), SOFT, partial(soft_ce, w=W, eps=0.1), 7.0,
    ),
    "pos_weight": (nn.BCEWithLogitsLoss(pos_weight=PW), UNIT, partial(bce, pos_weight=PW), 21.0),
    "pos_weight and weight": (nn.BCEWithLogitsLoss(W, pos_weight=PW), UNIT, partial(bce, weight=W, pos_weight=PW), 21.0),
    "weights of a loss without closed form": (
        nn.MultiLabelSoftMarginLoss(W), UNIT,
        lambda z, y: F.multilabel_soft_margin_loss(z, y, W, reduction="none"), 7.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_loss_options_count(option, net, dense, agrees):
    loss, target, rows, denominator = OPTIONS[option]
    reference = dense(net, [(X, target)], rows, denominator)
    agrees(Problem(net, loss, DataLoader(TensorDataset(X, target), batch_size=3)), reference)


def test_loss_options_of_log_probabilities_count_and_the_zero_ggn_is_announced(build_net, dense, agrees):
    model = build_net(lambda: nn.Sequential(Net(), nn.LogSoftmax(1)))
    reference = dense(model, [(X, Y)], lambda z, y: F.nll_loss(z, y, W, reduction="none"), float(W[Y].sum()))
    with pytest.warns(CurvalgWarning, match="CrossEntropy on the logits"):
        problem = Problem(model, nn.NLLLoss(W), DataLoader(PAIRS, batch_size=3))
    agrees(problem, reference, terms=("hessian", "covariance"))


REFUSED = {
    "no reduction": (nn.CrossEntropyLoss(reduction="none"), Y, "reduction='none'.*'mean'"),
    "no reduction of a function": (partial(F.mse_loss, reduction="none"), R, "reduction='none'"),
    "legacy option": (partial(F.cross_entropy, size_average=False), Y, "size_average.*reduction="),
    "an option of another name": (partial(F.mse_loss, weight=W), R, "option weight is not supported"),
    "positional options": (partial(F.cross_entropy, W), Y, "name them"),
    "soft labels with an index to ignore": (nn.CrossEntropyLoss(ignore_index=1), SOFT, "ignore_index=1"),
    "weights hidden in a callable": (lambda z, y: F.cross_entropy(z, y, W), Y, "class weights.*reduction="),
    "a weight of the wrong length": (nn.CrossEntropyLoss(W[:2]), Y, "label|shape"),
    "labels out of range": (nn.CrossEntropyLoss(), Y + 1, r"from 0 to 2.*got 3"),
    "the class instead of a loss": (nn.CrossEntropyLoss, Y, "create it"),
}


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("kind", REFUSED)
def test_loss_options_that_are_not_supported_are_refused_by_name(kind, net):
    loss, target, message = REFUSED[kind]
    with pytest.raises(LossError, match=message):
        lower("hessian", Problem(net, loss, (X, target))) @ torch.ones(24).double()


def test_loss_options_hidden_in_a_callable_that_the_first_batch_does_not_show(net):
    """Data sorted by class: in the first batch the class weights cancel, in later ones they do not."""
    order = Y.argsort()
    data = [(X[order][a:b], Y[order][a:b]) for a, b in ((0, 2), (2, 5), (5, 7))]
    assert Y[order][:2].unique().numel() == 1
    with pytest.raises(LossError, match="reduction="):
        lower("ggn", Problem(net, lambda z, y: F.cross_entropy(z, y, W), data)) @ torch.ones(24).double()


def test_loss_options_ignored_labels_in_a_callable_that_the_first_batch_does_not_show(net):
    labels = Y.clone()
    labels[5] = -100
    data = [(X[:3], labels[:3]), (X[3:], labels[3:])]
    with pytest.raises(LossError, match="reduction="):
        lower("ggn", Problem(net, lambda z, y: F.cross_entropy(z, y), data)) @ torch.ones(24).double()


def test_loss_of_more_than_two_arguments_is_refused_by_name(net):
    with pytest.raises(LossError, match=r"CTCLoss|\(output, target\)"):
        lower("hessian", Problem(net, nn.CTCLoss(), (X, Y))) @ torch.ones(24).double()
