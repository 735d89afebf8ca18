"""Which last linear layers let outputs be taken in chunks, and which are left alone and why."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from curvalg import Problem, restrict
from curvalg.problem.large_outputs import HeadNotes
from tests.support.large_outputs import (
    LAST,
    POSITIONWISE,
    PROBABILITIES,
    SUM,
    TWO,
    B,
    Language,
    T,
    V,
    agree,
    build,
    chunked,
    compare,
    data,
    pair,
    vectors,
)


def test_probabilities_with_classes_on_the_second_axis():
    batches = [(x, y.transpose(1, 2)) for (x, _), y in zip(data(), PROBABILITIES, strict=True)]
    compare(SUM, *pair(Language(lambda z: z.transpose(1, 2)), nn.CrossEntropyLoss(), batches))


@pytest.mark.parametrize("cache", [0, 2**30], ids=["fresh", "kept"])
@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"bias": False}, None),
        ({"tied": True}, None),
        ({"tied": True, "bias": False}, None),
        ({}, ["embed.*", "mix.*", "norm.*"]),
        ({}, ["head.*"]),
        ({}, ["head.bias"]),
        ({}, ["mix.*", "head.weight"]),
        ({"tied": True}, ["mix.*"]),
    ],
    ids=["no bias", "tied", "tied, no bias", "frozen", "alone", "bias alone", "bias frozen", "tied and frozen"],
)
def test_heads_of_every_kind(options, params, cache):
    chunks, whole = pair(Language(**options), LAST, data(), params=params, cache=cache)
    for name in ("ggn", "sum"):
        compare(POSITIONWISE[name], chunks, whole, 2)
    agree(chunks.gradient(), whole.gradient())


@pytest.mark.parametrize("part", ["head.*", "mix.*", "*weight"])
def test_restrictions(part):
    compare(restrict(build("hessian") + build("ggn"), part), *pair(Language(), LAST, data()), 2)


@pytest.mark.parametrize("memory", [0, 6 * 8 * V, TWO, 8 * V * B * T - 1])
def test_the_size_of_the_chunks_changes_nothing(memory):
    chunks, whole = pair(Language(), LAST, data(), memory=memory)
    compare(SUM, chunks, whole)
    asked = max(1, memory // (6 * 8 * V))
    assert f"in chunks of {asked} position" in SUM.lower(chunks).explain()


def test_small_outputs_are_left_alone():
    chunks, whole = pair(Language(), LAST, data(), memory=8 * V * B * T)
    op = SUM.lower(chunks)
    agree(op @ vectors(chunks), SUM.lower(whole) @ vectors(chunks))
    assert "outputs of" not in op.explain() and chunks.noted(HeadNotes).found is None
    assert Problem(Language(), LAST, data()).output_memory == 64 * 2**20


MATERIALISED = {
    "softcap": (lambda z: 3 * torch.tanh(z / 3), "(div|__truediv__)"),
    "scaled": (lambda z: 0.5 * z, "mul"),
    "in place": (lambda z: z.mul_(0.5), "mul_"),
    "in place in a view": (lambda z: (z.transpose(1, 2).mul_(2), z)[1], "mul_"),
    "written into": (lambda z: (z.__setitem__((..., 0), 0.0), z)[1], "__setitem__"),
    "some classes": (lambda z: z[..., : V - 1], "__getitem__"),
    "the classes moved": (lambda z: z[..., torch.arange(V).flip(0)], "__getitem__"),
    "the classes mixed": (lambda z: z.reshape(B, V, T), "reshape"),
    "a bias more": (lambda z: z + torch.arange(V).double() / V, "add"),
    "log_softmax": (lambda z: z.log_softmax(-1), "log_softmax"),
}


class _Scaled(torch.autograd.Function):
    """The identity, with gradients halved twice: the model's matrix is not that of its layer."""

    @staticmethod
    def forward(ctx, z):
        return z.view_as(z)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 4

    @staticmethod
    def jvp(ctx, tangent):
        return tangent / 4


@pytest.mark.parametrize("name", MATERIALISED)
def test_other_functions_of_the_outputs_make_them_and_explain_says_which(name):
    after, function = MATERIALISED[name]
    classes = V - 1 if name == "some classes" else V
    loss = nn.CrossEntropyLoss() if name == "the classes mixed" else LAST
    batches = [(x, y % classes) for x, y in data()]
    for expr in (build("ggn"), SUM):
        chunks, whole = pair(Language(after), loss, batches)
        op = expr.lower(chunks)
        agree(op @ vectors(chunks), expr.lower(whole) @ vectors(chunks))
        said = rf"as a whole: the outputs of the layer 'head.weight' go into the function {function}"
        assert not chunked(op) and re.search(said, op.explain()), op.explain()
        agree(chunks.gradient(), whole.gradient())
        assert chunks.value() == pytest.approx(whole.value(), rel=1e-12)


@pytest.mark.parametrize("deep", [False, True], ids=["outputs", "an inner layer"])
def test_functions_of_the_users_with_derivatives_of_their_own(deep):
    model = Language(None if deep else _Scaled.apply, wide=40 if deep else None)
    if deep:
        model.wide[0].register_forward_hook(lambda module, args, z: _Scaled.apply(z))
    chunks, whole = pair(model, LAST, data(), memory=0)
    op = build("ggn").lower(chunks)
    agree(op @ vectors(chunks), build("ggn").lower(whole) @ vectors(chunks))
    assert chunked(op) is deep


@pytest.mark.parametrize("name", ["ggn", "sum"])
def test_inner_layers_that_are_as_large_are_left_alone(name):
    chunks, whole = pair(Language(wide=40), LAST, data(), memory=0)
    compare(POSITIONWISE[name], chunks, whole)
    assert chunks.noted(HeadNotes).inner == {"mix.weight", "wide.0.weight", "wide.2.weight"}


def test_outputs_in_a_mapping_are_picked_by_forward():
    class Wrapped(Language):
        def forward(self, tokens):
            return {"logits": super().forward(tokens), "aux": None}

    options = {"forward": lambda model, batch: model(batch[0])["logits"][:, :-1]}
    compare(SUM, *pair(Wrapped(), LAST, data(lambda y: y[:, 1:]), memory=0, **options))
    chunks, _ = pair(Language(lambda z: (z, z[..., :1])), None, data())
    assert not chunked(build("jacobian").lower(chunks))


def test_a_model_that_is_a_function():
    model = Language()
    params = dict(model.named_parameters())

    def function(given, X):
        return torch.func.functional_call(model, given, (X,))

    compare(SUM, *pair(function, LAST, data(), params=params))


def test_targets_that_do_not_fit_are_refused_as_ever():
    chunks, _ = pair(Language(), nn.CrossEntropyLoss(), data())
    with pytest.raises(Exception, match="class_axis=-1"):
        build("ggn").lower(chunks) @ vectors(chunks)


def test_outputs_that_are_not_finite_are_refused_as_ever():
    model = Language()
    model.head.bias.data[2] = math.inf
    chunks, _ = pair(model, LAST, data())
    with pytest.raises(Exception, match="NaN or infinite entries"):
        build("ggn").lower(chunks) @ vectors(chunks)
