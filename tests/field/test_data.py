"""Troubles of users with data and denominators: one test, or more, for every line of the list they were gathered in."""

from __future__ import annotations

import random
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from curvalg import CurvalgError, CurvalgWarning, LossError, Problem, ProblemError, registry
from curvalg.losses import CrossEntropy
from tests.support.dense import Case, Dense
from tests.support.third_party import CenteredTangent

_g = torch.Generator().manual_seed(0)


def rng():
    return torch.Generator().manual_seed(2)


N = 7
X = torch.randn(N, 3, generator=_g).double()
Y = torch.tensor([0, 2, 1, 1, 0, 2, 2])
R = torch.randn(N, 3, generator=_g).double()
SOFT = torch.rand(N, 3, generator=_g).double().softmax(1)
UNIT = torch.rand(N, 3, generator=_g).double()
W = torch.tensor([0.5, 2.0, 1.0]).double()
CE = nn.CrossEntropyLoss()
PAIRS = TensorDataset(X, Y)


class Net(nn.Module):
    """Two layers; extra inputs are added."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, shift=None):
        return self.head(torch.tanh(self.body(x if shift is None else x + shift)))


class Tagger(nn.Module):
    """Classes of every token, (B, C, T); a position sees those before it, so padding at the end changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 2), nn.Linear(2, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens).cumsum(1))).transpose(1, 2)


def ce(z, y, **options):
    return F.cross_entropy(z, y, reduction="none", **options)


def mse(z, y):
    return (z - y).square().sum(1)


@pytest.fixture
def net(build_net):
    return build_net(Net)


@pytest.fixture
def tagger(build_net):
    return build_net(Tagger)


@pytest.fixture
def whole(net):
    """The reference of (X, Y) under plain cross-entropy, as one batch."""
    return Dense(Case(net, CE, [(X, Y)], ce, float(N)))


def fresh(*args, **options):
    """A problem that reads the data in every product: what is kept is immune to loaders that change."""
    return Problem(*args, **{"cache": 0, **options})


def lower(name, problem):
    return registry.build(name).lower(problem)


def ones(op):
    return torch.ones(op.shape[1]).double()


# -- wrong mean with an uneven last batch -> global counts ------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 9])
def test_uneven_last_batch_of_a_mean_loss(size, net, whole, agrees):
    problem = Problem(net, CE, DataLoader(PAIRS, batch_size=size))
    agrees(problem, whole)
    assert problem.num_samples == N
    assert abs(problem.value() - CE(net(X), Y).item()) < 1e-12


def test_uneven_last_batch_is_not_the_average_of_batch_means(net, whole):
    """The reference tells the two apart: batches of 3, 3 and 1 rows."""
    means = [Dense(Case(net, CE, [b], ce, float(len(b[1])))).hessian for b in DataLoader(PAIRS, batch_size=3)]
    assert (sum(means) / 3 - whole.hessian).norm() > 1e-2 * whole.hessian.norm()


@pytest.mark.parametrize(
    "loss",
    [lambda z, y: (z - y).square().mean(), partial(F.mse_loss), nn.MSELoss()],
    ids=["callable", "function", "module"],
)
def test_uneven_last_batch_of_a_regression(loss, net, dense, agrees):
    reference = dense(net, [(X, R)], mse, float(R.numel()))
    agrees(Problem(net, loss, DataLoader(TensorDataset(X, R), batch_size=3)), reference)


def test_uneven_last_batch_of_a_sum_loss(net, dense, agrees):
    reference = dense(net, [(X, R)], mse, None)
    for loss in (nn.MSELoss(reduction="sum"), lambda z, y: (z - y).square().sum()):
        agrees(Problem(net, loss, DataLoader(TensorDataset(X, R), batch_size=3)), reference)


def test_uneven_last_batch_dropped_by_the_loader_is_not_counted(net, dense, agrees):
    problem = Problem(net, CE, DataLoader(PAIRS, batch_size=3, drop_last=True))
    agrees(problem, dense(net, [(X[:6], Y[:6])], ce, 6.0))
    assert problem.num_samples == 6


def test_uneven_batches_one_of_them_empty(net, whole, agrees):
    agrees(Problem(net, CE, [(X[:2], Y[:2]), (X[:0], Y[:0]), (X[2:], Y[2:])]), whole)


# -- variable length and padding -> sum, then one global token count ----------------------------------------------------------

SENTENCES = [torch.randint(0, 6, (n,), generator=_g) for n in (4, 1, 3, 5, 2, 2)]
TAGS = [torch.randint(0, 3, (len(s),), generator=_g) for s in SENTENCES]


def padded(label):
    """Ragged batches of padded sentences: (3, 4), (2, 5), (1, 2)."""
    return [
        (
            pad_sequence(SENTENCES[a:b], batch_first=True, padding_value=5),
            pad_sequence(TAGS[a:b], batch_first=True, padding_value=label),
        )
        for a, b in ((0, 3), (3, 5), (5, 6))
    ]


def unpadded(samples):
    """The reference never sees padding: a batch for every sentence."""
    batches = [(s[None], t[None]) for s, t in zip(SENTENCES, TAGS, strict=True)]
    return batches, (lambda z, y: ce(z, y).sum(1)) if samples == "item" else (lambda z, y: ce(z, y).reshape(-1))


@pytest.mark.parametrize("samples", ["item", "position"])
@pytest.mark.parametrize("label", [-100, 7])
def test_padding_and_variable_length_count_tokens_over_all_batches(label, samples, tagger, dense, agrees):
    batches, rows = unpadded(samples)
    tokens = sum(map(len, TAGS))
    reference = dense(tagger, batches, rows, float(tokens))
    problem = Problem(tagger, nn.CrossEntropyLoss(ignore_index=label), padded(label), samples=samples)
    agrees(problem, reference)
    assert problem.num_samples == (len(SENTENCES) if samples == "item" else tokens)
    with torch.no_grad():
        expected = sum(ce(tagger(s[None]), t[None]).sum().item() for s, t in zip(SENTENCES, TAGS, strict=True)) / tokens
    assert abs(problem.value() - expected) < 1e-12


def test_padding_does_not_depend_on_how_far_batches_are_padded(tagger, vectors):
    far = [(F.pad(s, (0, 3), value=1), F.pad(t, (0, 3), value=-100)) for s, t in padded(-100)]
    near = Problem(tagger, CE, padded(-100))
    V = vectors(near.size)
    for name in ("hessian", "centered_covariance"):
        got, expected = (lower(name, p) @ V for p in (Problem(tagger, CE, far), near))
        assert (got - expected).norm() < 1e-12


def test_padding_labels_are_ignored_whole_rows_and_batches_too(tagger, dense, agrees):
    tokens = torch.randint(0, 6, (4, 3), generator=rng())
    labels = torch.tensor([[0, 1, -100], [-100] * 3, [2, 2, 0], [-100] * 3])
    data = [(tokens[:2], labels[:2]), (tokens[2:3], labels[2:3]), (tokens[3:], labels[3:])]
    keep = torch.tensor([0, 2])
    reference = dense(tagger, [(tokens[keep], labels[keep])], lambda z, y: ce(z, y).sum(1), 5.0, count=2)
    problem = Problem(tagger, CE, data)
    agrees(problem, reference)
    assert problem.num_samples == 2


def test_padding_everywhere_leaves_nothing_to_average(tagger):
    problem = Problem(tagger, CE, (torch.zeros(2, 3).long(), torch.full((2, 3), -100)))
    with pytest.raises(ProblemError, match="ignored"):
        lower("ggn", problem)


def test_padding_in_a_packed_sequence(build_net, dense, agrees):
    """Sentences of variable length as a PackedSequence, read by a recurrent layer."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(2, 2, batch_first=True), nn.Linear(2, 3)

        def forward(self, x):
            h = self.rnn(x)[0]
            if isinstance(h, PackedSequence):
                h, lengths = pad_packed_sequence(h, batch_first=True)
                last = h[torch.arange(len(h)), lengths - 1]
            else:
                last = h[:, -1]
            return self.head(last)

    model = build_net(Packed)
    series = torch.randn(8, 2, generator=rng()).double().split((2, 3, 1, 2))
    y = torch.tensor([0, 2, 1, 1])
    data = [(pack_sequence(series[a:b], enforce_sorted=False), y[a:b]) for a, b in ((0, 3), (3, 4))]
    reference = dense(model, [(s[None], t[None]) for s, t in zip(series, y, strict=True)], ce, 4.0)
    agrees(Problem(model, CE, data), reference, terms=("hessian", "ggn", "covariance"))


# -- class weights, label smoothing, pos_weight, soft labels: counted, or refused by name -------------------------------------

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


# -- batches of every form ----------------------------------------------------------------------------------------------------


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


class OwnMapping(Mapping):
    def __init__(self, **data):
        self._data = data

    def __getitem__(self, key):
        return self._data[key]

    def __iter__(self):
        return iter(self._data)

    def __len__(self):
        return len(self._data)


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


# -- loaders that shuffle -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 7])
def test_shuffling_loader_leaves_additive_terms_right(size, net, whole, agrees):
    agrees(fresh(net, CE, DataLoader(PAIRS, batch_size=size, shuffle=True)), whole)


SHUFFLED = {
    "shuffle": lambda size: DataLoader(PAIRS, batch_size=size, shuffle=True),
    "sampler": lambda size: DataLoader(PAIRS, batch_size=size, sampler=RandomSampler(PAIRS)),
    "batch sampler": lambda size: DataLoader(PAIRS, batch_sampler=BatchSampler(RandomSampler(PAIRS), size, False)),
    "own iterable": lambda size: Reshuffled(size),
}


class Reshuffled:
    """Re-iterable, another order in every pass."""

    def __init__(self, size):
        self.size, self.rng = size, torch.Generator().manual_seed(3)

    def __iter__(self):
        order = torch.randperm(N, generator=self.rng)
        return ((X[k], Y[k]) for k in order.split(self.size))


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("kind", SHUFFLED)
@pytest.mark.parametrize("name", ["jacobian", "loss_hessian"])
def test_shuffling_loader_is_refused_where_rows_have_an_order(name, kind, size, net):
    problem = fresh(net, CE, SHUFFLED[kind](size))
    with pytest.raises(ProblemError, match=r"shuffle=False.*list\(loader\)"):
        op = lower(name, problem)
        for _ in range(3):
            op @ ones(op)


@pytest.mark.parametrize("cache", [0, "auto"])
@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("kind", SHUFFLED)
def test_shuffling_loader_never_changes_monte_carlo_draws_silently(kind, size, cache, net):
    """Draws are keyed by the number of the sample in the data: refused, or the same matrix in every product."""
    try:
        op = lower("ggn_mc", fresh(net, CE, SHUFFLED[kind](size), cache=cache))
        first, *others = [op @ ones(op) for _ in range(4)]
    except ProblemError as error:
        assert "shuffle=False" in str(error)
    else:
        assert all(torch.allclose(first, other, atol=1e-12) for other in others)


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("kind", SHUFFLED)
def test_shuffling_loader_with_frozen_randomness_is_refused(kind, size, build_net):
    """The masks are replayed by position in the batch, so other rows would meet them in every pass."""
    model = build_net(lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    problem = fresh(model, CE, SHUFFLED[kind](size), randomness="frozen")
    with pytest.raises(ProblemError, match="order"):
        op = lower("ggn", problem)
        for _ in range(3):
            op @ ones(op)


@pytest.mark.parametrize("kind", SHUFFLED)
def test_shuffling_loader_with_batch_statistics_is_refused(kind, build_net):
    """Batch-norm in training mode: which samples share a batch decides the matrix."""
    model = build_net(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).train())
    with pytest.raises(ProblemError, match=r"order|shuffle"):
        op = lower("hessian", fresh(model, CE, SHUFFLED[kind](4)))
        for _ in range(3):
            op @ ones(op)


class Alternating:
    """Re-iterable; every second pass comes in another order, which a comparison with the first pass alone misses."""

    def __init__(self, *orders):
        self.orders, self.passes = orders, 0

    def __iter__(self):
        order = self.orders[self.passes % len(self.orders)]
        self.passes += 1
        return iter([(X[k], Y[k]) for k in order])


FORWARD, BACKWARD = torch.arange(N).split(2), torch.arange(N).flip(0).split(2)
WITHIN = (torch.tensor([1, 0, 2, 3, 4, 5, 6]),)


@pytest.mark.parametrize(
    "orders",
    [(FORWARD, BACKWARD, FORWARD), (FORWARD, FORWARD, BACKWARD), ((torch.arange(N),), WITHIN, (torch.arange(N),))],
    ids=["reduce", "product", "within a batch"],
)
def test_shuffling_between_the_two_passes_of_one_product_is_not_silent(orders, net):
    """Tangents of the first pass are used in the second: either refused, or right."""
    expected = CenteredTangent().lower(fresh(net, CE, (X, Y))) @ torch.ones(24).double()
    op = CenteredTangent().lower(fresh(net, CE, Alternating(*orders)))
    try:
        got = op @ ones(op)
    except ProblemError as error:
        assert "order" in str(error)
    else:
        assert torch.allclose(got, expected, atol=1e-12)


def test_shuffling_with_dropped_rows_or_replacement_is_another_matrix(net):
    for loader in (
        DataLoader(PAIRS, batch_size=3, shuffle=True, drop_last=True),
        DataLoader(PAIRS, batch_size=3, sampler=RandomSampler(PAIRS, replacement=True)),
    ):
        op = lower("hessian", fresh(net, CE, loader))
        with pytest.raises(ProblemError, match=r"differ from the first pass.*list\(loader\)"):
            for _ in range(20):
                op @ ones(op)


def test_shuffling_is_told_by_explain(net):
    text = lower("hessian", fresh(net, CE, DataLoader(PAIRS, batch_size=2, shuffle=True))).explain()
    assert "shuffles" in text


def test_list_of_a_shuffling_loader_fixes_one_pass(net, whole, agrees):
    batches = list(DataLoader(PAIRS, batch_size=2, shuffle=True))
    problem = fresh(net, CE, batches)
    agrees(problem, whole)
    J = lower("jacobian", problem)
    order = torch.cat([(x == X).all(1).nonzero()[0] for x in torch.cat([b[0] for b in batches])])
    expected = (whole.jacobian @ torch.ones(24).double()).reshape(N, 3)[order].reshape(-1)
    assert torch.allclose(J @ ones(J), expected, atol=1e-12)


# -- loaders that augment -----------------------------------------------------------------------------------------------------


class Augmented(Dataset):
    def __init__(self, change):
        self.change = change

    def __len__(self):
        return N

    def __getitem__(self, k):
        return self.change(X[k], Y[k])


AUGMENTATIONS = {
    "torch noise": lambda x, y: (x + 0.1 * torch.randn_like(x), y),
    "NumPy noise": lambda x, y: (x + 0.1 * np.random.randn(), y),
    "Python noise": lambda x, y: (x + 0.1 * random.random(), y),
    "small noise": lambda x, y: (x + 1e-6 * torch.randn_like(x), y),
    "random flips": lambda x, y: (x.flip(0) if torch.rand(()) < 0.5 else x, y),
    "random signs": lambda x, y: (-x if random.random() < 0.5 else x, y),
    "noisy labels": lambda x, y: (x, (y + torch.randint(0, 3, ())) % 3),
    "mixing inputs": lambda x, y: (0.9 * x + 0.1 * X[torch.randint(0, N, ())], y),
    "complex noise": lambda x, y: (torch.complex(x, 0.1 * torch.randn_like(x)), y),
}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmenting_loader_is_detected_and_explained(kind, shuffle, net):
    loader = DataLoader(Augmented(AUGMENTATIONS[kind]), batch_size=3, shuffle=shuffle)
    forward = (lambda m, b: m(b[0].real + b[0].imag)) if kind == "complex noise" else None
    op = lower("hessian", fresh(net, CE, loader, forward=forward))
    with pytest.raises(ProblemError, match=r"augmentation.*list\(loader\)"):
        for _ in range(4):
            op @ ones(op)


def test_augmenting_by_another_pairing_of_inputs_and_targets_is_detected(net):
    """The inputs of a pass are the same, and so are the targets, but not which belong together."""

    class Pairing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(X, Y.roll(self.passes - 1))])

    op = lower("hessian", fresh(net, CE, Pairing()))
    with pytest.raises(ProblemError, match="differ from the first pass"):
        op @ ones(op)


def test_augmenting_inside_a_mapping_of_another_class_is_detected(net):
    class Noisy:
        def __iter__(self):
            return iter([OwnMapping(x=X + torch.randn_like(X), labels=Y)])

    op = lower("hessian", fresh(net, CE, Noisy()))
    with pytest.raises(ProblemError, match="augmentation"):
        op @ ones(op)


def test_augmenting_loader_fixed_by_a_list(net, dense, agrees):
    batches = list(DataLoader(Augmented(AUGMENTATIONS["torch noise"]), batch_size=3))
    reference = dense(net, [tuple(torch.cat(t) for t in zip(*batches, strict=True))], ce, 7.0)
    agrees(fresh(net, CE, batches), reference)


def test_stateful_data_set_is_detected(net):
    class Counting(Dataset):
        calls = 0

        def __len__(self):
            return N

        def __getitem__(self, k):
            self.calls += 1
            return X[k] * (1 + self.calls), Y[k]

    op = lower("ggn", fresh(net, CE, DataLoader(Counting(), batch_size=3)))
    with pytest.raises(ProblemError, match="stateful"):
        op @ ones(op)


# -- random states ------------------------------------------------------------------------------------------------------------


def random_states(*generators):
    python, numpy = random.getstate(), np.random.get_state()
    return [torch.get_rng_state().tolist(), python, str(numpy), *(g.get_state().tolist() for g in generators)]


def test_random_states_of_the_user_and_the_loader_do_not_move(net):
    own = torch.Generator().manual_seed(5)
    loaders = [
        DataLoader(PAIRS, batch_size=2, shuffle=True),
        DataLoader(PAIRS, batch_size=2, shuffle=True, generator=own),
        DataLoader(PAIRS, batch_size=2, sampler=RandomSampler(PAIRS, generator=own)),
        DataLoader(PAIRS, batch_sampler=BatchSampler(RandomSampler(PAIRS, generator=own), 2, False)),
    ]
    for loader in loaders:
        before = random_states(own)
        problem = fresh(net, CE, loader)
        op = lower("hessian", problem)
        op @ ones(op), op @ ones(op), problem.value(), problem.gradient()
        assert random_states(own) == before


def test_random_states_do_not_move_when_a_product_fails(net):
    own = torch.Generator().manual_seed(5)
    for change in ("torch noise", "NumPy noise", "Python noise"):
        loader = DataLoader(Augmented(AUGMENTATIONS[change]), batch_size=2, shuffle=True, generator=own)
        before = random_states(own)
        op = lower("hessian", fresh(net, CE, loader))
        with pytest.raises(ProblemError):
            op @ ones(op)
        assert random_states(own) == before


def test_random_states_an_interrupted_epoch_of_the_users_goes_on(net):
    """The user iterates over the same loader while products are taken."""
    loader = DataLoader(PAIRS, batch_size=2, shuffle=True)
    torch.manual_seed(0)
    expected = [x for x, _ in loader]
    torch.manual_seed(0)
    op = lower("hessian", fresh(net, CE, loader))
    seen = []
    for x, _ in loader:
        op @ ones(op)
        seen.append(x)
    assert all(map(torch.equal, seen, expected))


@pytest.mark.parametrize("shuffle", [False, True])
def test_loader_with_worker_processes(shuffle, net, whole, agrees):
    before = random_states()
    problem = fresh(net, CE, DataLoader(PAIRS, batch_size=3, shuffle=shuffle, num_workers=2))
    agrees(problem, whole, terms=("hessian",), gradient=False)
    assert random_states() == before


def test_loader_with_persistent_worker_processes_that_augment_is_detected(net):
    data = Augmented(AUGMENTATIONS["torch noise"])
    loader = DataLoader(data, batch_size=3, num_workers=1, persistent_workers=True)
    op = lower("hessian", fresh(net, CE, loader))
    with pytest.raises(ProblemError, match="augmentation"):
        op @ ones(op)


def test_inputs_changed_in_place_by_the_model_are_not_silent(build_net):
    """x.mul_() in forward changes the user's data, and every product would be of another matrix."""

    class InPlace(Net):
        def forward(self, x):
            return super().forward(x.mul_(1.5))

    model, data = build_net(InPlace), (X.clone(), Y)
    op = lower("hessian", fresh(model, CE, data))
    try:
        first, second = op @ ones(op), op @ ones(op)
    except ProblemError as error:
        assert "place" in str(error)
    else:
        assert torch.equal(first, second)
        assert torch.equal(data[0], X)


# -- empirical Fisher from per-sample gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_empirical_fisher_does_not_depend_on_the_batch_size(size, net, whole, agrees):
    problem = Problem(net, CE, DataLoader(PAIRS, batch_size=size))
    agrees(problem, whole, terms=("covariance", "centered_covariance"))
    diagonal = registry.build("covariance_diagonal").lower(problem)
    assert torch.allclose(diagonal @ ones(diagonal), whole.covariance.diag(), atol=1e-12)
    assert torch.allclose(lower("empirical_fisher", problem).to_dense(), whole.covariance, atol=1e-12)


def test_empirical_fisher_is_the_mean_of_outer_products_of_per_sample_gradients(net, whole):
    by_hand = torch.zeros(24, 24).double()
    for x, y in zip(X, Y, strict=True):
        g = torch.autograd.grad(CE(net(x[None]), y[None]), list(net.parameters()))
        flat = torch.cat([t.reshape(-1) for t in g])
        by_hand += torch.outer(flat, flat) / N
    got = lower("covariance", Problem(net, CE, DataLoader(PAIRS, batch_size=4))).to_dense()
    assert torch.allclose(got, by_hand, atol=1e-12)
    squared_mean = torch.outer(whole.gradient, whole.gradient)
    assert (got - squared_mean).norm() > 0.1 * got.norm()


def test_empirical_fisher_of_a_sum_loss_has_no_factor(net, dense, agrees):
    reference = dense(net, [(X, Y)], ce, None)
    agrees(
        Problem(net, CrossEntropy(reduction="sum"), DataLoader(PAIRS, batch_size=4)), reference, terms=("covariance",)
    )
