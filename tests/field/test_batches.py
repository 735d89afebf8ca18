"""Batches of every form, and data that are empty or can be read once."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from curvalg import CurvalgError, LossError, Problem, ProblemError
from tests.support.field.data import (
    CE,
    PAIRS,
    UNIT,
    N,
    OwnMapping,
    R,
    X,
    Y,
    fresh,
    lower,
    mse,
    ones,
)


class BatchEncoding(UserDict):
    """As tokenizers of another library return: a UserDict with attribute and integer access."""

    def __init__(self, data=None, encodings=None):
        super().__init__(data)
        self._encodings = encodings

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None

    def keys(self):
        return self.data.keys()


Pair = namedtuple("Pair", ["inputs", "label"])
Triple = namedtuple("Triple", ["inputs", "shift", "label"])


@dataclass
class Bag:
    x: torch.Tensor
    y: torch.Tensor


def slices(*cuts):
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


FORMS = {
    "tuples": lambda s: (X[s], Y[s]),
    "lists": lambda s: [X[s], Y[s]],
    "named pairs": lambda s: Pair(X[s], Y[s]),
    "dicts with labels": lambda s: {"x": X[s], "labels": Y[s]},
    "dicts with y": lambda s: {"x": X[s], "y": Y[s]},
    "ordered dicts": lambda s: OrderedDict(x=X[s], target=Y[s]),
    "user dicts": lambda s: UserDict(x=X[s], label=Y[s]),
    "batch encodings": lambda s: BatchEncoding({"x": X[s], "labels": Y[s]}, encodings=[1]),
    "own mappings": lambda s: OwnMapping(x=X[s], labels=Y[s]),
    "dicts with a None": lambda s: {"x": X[s], "shift": None, "labels": Y[s]},
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_that_are(form, net, whole, agrees):
    data = [FORMS[form](s) for s in slices(0, 2, 5, 7)]
    agrees(Problem(net, CE, data), whole)


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"lists"}))
def test_one_batch_without_a_list(form, net, whole, agrees):
    agrees(Problem(net, CE, FORMS[form](slice(0, 7))), whole, terms=("hessian", "covariance"))


def shifted(model, batch):
    return model(batch[0], batch[1])


ADAPTED = {
    "triples": (lambda s: (X[s], 0 * X[s], Y[s]), shifted, lambda b: b[2]),
    "named triples": (lambda s: Triple(X[s], 0 * X[s], Y[s]), lambda m, b: m(b.inputs, b.shift), lambda b: b.label),
    "nested inputs": (lambda s: ((X[s], 0 * X[s]), Y[s]), lambda m, b: m(*b[0]), None),
    "nested dicts": (
        lambda s: {"in": {"x": X[s], "rest": [0 * X[s]]}, "out": {"class": Y[s]}},
        lambda m, b: m(b["in"]["x"], b["in"]["rest"][0]),
        lambda b: b["out"]["class"],
    ),
    "dict targets": (lambda s: (X[s], {"class": Y[s], "weight": R[s]}), None, lambda b: b[1]["class"]),
    "data classes": (lambda s: Bag(X[s], Y[s]), lambda m, b: m(b.x), lambda b: b.y),
    "strings beside tensors": (lambda s: {"x": X[s], "id": ["a"], "class": Y[s]}, lambda m, b: m(b["x"]), lambda b: b["class"]),
}  # fmt: skip


@pytest.mark.parametrize("form", ADAPTED)
def test_batches_adapted_by_forward_and_target(form, net, whole, agrees):
    make, forward, target = ADAPTED[form]
    data = [make(s) for s in slices(0, 2, 5, 7)]
    agrees(Problem(net, CE, data, forward=forward, target=target), whole)
    loader = DataLoader(data, batch_size=None)
    agrees(Problem(net, CE, loader, forward=forward, target=target), whole, terms=("hessian", "centered_covariance"))


def test_targets_that_are_dicts_reach_a_callable_loss(net, dense, agrees):
    data = [(X[s], {"mean": R[s], "scale": UNIT[s]}) for s in slices(0, 2, 5, 7)]

    def loss(z, y):
        return ((z - y["mean"]).square() * y["scale"]).sum(1).mean()

    reference = dense(net, [(X, R)], lambda z, y: ((z - y).square() * UNIT).sum(1), 7.0)
    agrees(Problem(net, loss, data), reference)


def test_targets_that_are_dicts_are_explained_to_a_closed_form_loss(net):
    with pytest.raises(LossError, match="target="):
        lower("ggn", Problem(net, CE, (X, {"class": Y})))


def test_targets_that_are_the_inputs(net, dense, agrees):
    """An auto-encoder's batches are tensors."""
    reference = dense(net, [(X, X)], mse, 21.0)
    data = DataLoader(X, batch_size=3)
    agrees(Problem(net, nn.MSELoss(), data, forward=lambda m, b: m(b), target=lambda b: b), reference)
    with pytest.raises(ProblemError, match="target="):
        lower("ggn", Problem(net, nn.MSELoss(), data))


UNREADABLE = {
    "triples": ([(X, 0 * X, Y)], "forward=.*target="),
    "no known key": ([{"x": X, "class": Y}], r"keys are \['x', 'class'\].*target="),
    "two known keys": ([{"x": X, "label": Y, "target": Y}], "keys are.*target="),
    "a named triple": ([Triple(X, X, Y)], "forward=.*target="),
    "a list for a tuple": ([X, Y], r"one batch is a tuple \(X, y\)"),
    "a data set": (PAIRS, "DataLoader|loader"),
    "a number": (3, r"tuple \(X, y\), a list of batches or a loader, got int"),
    "a string": ("data.pt", r"tuple \(X, y\), a list of batches or a loader, got str"),
    "nothing": (None, "NoneType"),
    "NumPy arrays": ((X.numpy(), Y.numpy()), "(?i)tensor"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_batches_that_cannot_be_read_are_explained(kind, net):
    data, message = UNREADABLE[kind]
    with pytest.raises(ProblemError, match=message):
        lower("ggn", Problem(net, CE, data))


def test_batches_in_a_tuple_for_a_list_are_explained(net):
    data = tuple((X[s], Y[s]) for s in slices(0, 2, 5, 7))
    with pytest.raises(CurvalgError, match="list"):
        lower("ggn", Problem(net, CE, data))
    with pytest.raises(CurvalgError, match=r"list|target="):
        lower("ggn", Problem(net, CE, data[:2]))


def test_batches_that_the_model_does_not_take_are_explained(net):
    with pytest.raises(ProblemError, match="forward="):
        lower("ggn", Problem(net, CE, {"pixels": X, "labels": Y})) @ torch.ones(24).double()


@pytest.mark.parametrize(
    "data", [[], DataLoader([]), [(X[:0], Y[:0])], {}, ()], ids=["list", "loader", "rows", "dict", "tuple"]
)
def test_empty_data_are_refused(data, net):
    with pytest.raises(ProblemError, match=r"empty|target"):
        lower("ggn", Problem(net, CE, data))


def one_shot():
    yield X[:3], Y[:3]
    yield X[3:], Y[3:]


@pytest.mark.parametrize(
    "make", [one_shot, lambda: iter([(X, Y)]), lambda: map(tuple, [(X, Y)]), lambda: iter(DataLoader(PAIRS))]
)
def test_one_shot_generators_are_refused_at_once(make, net):
    with pytest.raises(ProblemError, match=r"only once.*list\(data\)"):
        Problem(net, CE, make())


def test_one_shot_generators_behind_an_iterable_are_explained(net):
    """An object whose __iter__ always hands out the same generator: the second pass yields nothing."""

    class Once(IterableDataset):
        def __init__(self):
            self.source = one_shot()

        def __iter__(self):
            return self.source

    for data in (Once(), DataLoader(Once(), batch_size=None)):
        op = lower("ggn", fresh(net, CE, data))
        with pytest.raises(ProblemError, match=r"once|starts anew|first pass"):
            op @ ones(op)


def test_iterable_that_starts_anew_is_read(net, whole, agrees):
    class Anew:
        def __iter__(self):
            return one_shot()

    agrees(Problem(net, CE, Anew()), whole)
    agrees(Problem(net, CE, list(one_shot())), whole)


def test_stateful_data_set_that_grows_or_shrinks_is_detected(net):
    class Shrinking(IterableDataset):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(X[k], Y[k]) for k in range(N - self.passes)])

    op = lower("ggn", fresh(net, CE, DataLoader(Shrinking(), batch_size=2)))
    with pytest.raises(ProblemError, match=r"differ from the first pass.*stateful"):
        op @ ones(op)
