"""Trees, fingerprints and passes over the data."""

from __future__ import annotations

import dataclasses
from collections import ChainMap, OrderedDict, UserDict, defaultdict
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from curvalg.errors import ProblemError
from curvalg.problem.data.batches import Data
from curvalg.problem.data.row_hashes import fingerprint, same_order, same_rows, total
from curvalg.tensors import trees

CPU = torch.device("cpu")
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, 1, 0, 2])


class Attributes(OrderedDict):
    """Entries are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Mirror(dict):
    """Entries are attributes too, in another way."""

    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__ = self


class Frozen(Mapping):
    def __init__(self, **items):
        self._items = items

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Mutable(Frozen, MutableMapping):
    def __setitem__(self, key, value):
        self._items[key] = value

    def __delitem__(self, key):
        del self._items[key]


class Slotted(MutableMapping):
    """A copy shares its entries."""

    __slots__ = ("_items",)
    __init__, __getitem__, __iter__, __len__ = Frozen.__init__, Frozen.__getitem__, Frozen.__iter__, Frozen.__len__
    __setitem__, __delitem__ = Mutable.__setitem__, Mutable.__delitem__


class Lazy(Frozen):
    """Its entries are made anew in every access."""

    def __getitem__(self, key):
        return self._items[key].clone()


@dataclasses.dataclass(frozen=True)
class Bag:
    x: torch.Tensor
    y: object = None


# -- trees ----------------------------------------------------------------------------------------------------------------------

MAPPINGS = {
    "dict": dict,
    "ordered": OrderedDict,
    "default": lambda **items: defaultdict(list, **items),
    "user": UserDict,
    "attributes": Attributes,
    "mirror": Mirror,
    "frozen": Frozen,
    "mutable": Mutable,
    "chain": lambda **items: ChainMap(items),
}


@pytest.mark.parametrize("kind", MAPPINGS)
def test_mappings_keep_their_class_and_the_original_its_entries(kind):
    x, y = X.clone(), Y.clone()
    tree = (MAPPINGS[kind](x=x, rest=[y, None], name="a"), 3)
    twin, number = trees.tensor_map(lambda t: t + 1, tree)
    assert type(twin) is type(tree[0]) and number == 3
    assert list(twin) == list(tree[0]) and twin["name"] == "a" and twin["rest"][1] is None
    assert torch.equal(twin["x"], X + 1) and torch.equal(twin["rest"][0], Y + 1)
    if kind in ("attributes", "mirror"):
        assert twin.x is twin["x"]
    assert tree[0]["x"] is x and tree[0]["rest"][0] is y
    assert {id(t) for t in trees.tensors(tree)} == {id(x), id(y)}


@pytest.mark.parametrize("make", [Slotted, Lazy, lambda **items: MappingProxyType(items)])
def test_mappings_that_cannot_be_rebuilt_become_dicts(make):
    x = X.clone()
    original = make(x=x)
    twin = trees.tensor_map(lambda t: t + 1, original)
    assert type(twin) is dict and torch.equal(twin["x"], X + 1)
    assert torch.equal(original["x"], X)


def test_data_classes_are_looked_into():
    bag = Bag(X, [Y, None])
    twin = trees.tensor_map(lambda t: t + 1, bag)
    assert torch.equal(twin.x, X + 1) and torch.equal(twin.y[0], Y + 1)
    assert bag.x is X and bag.y[0] is Y


@given(st.recursive(st.sampled_from([X, Y, None, 1, "a"]), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.tuples(inner, inner), st.builds(lambda v: Frozen(a=v), inner),
    st.builds(lambda v, w: Attributes(b=v, a=w), inner, inner), st.builds(Bag, inner),
), max_leaves=8))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_taking_a_tree_apart_and_putting_it_together_is_nothing(tree):
    leaves, form = trees.flatten(tree)
    assert not trees.tensors(form)
    again, _ = trees.flatten(trees.unflatten(form, leaves))
    assert len(again) == len(leaves) and all(a is b for a, b in zip(again, leaves, strict=True))


def test_lengths_of_packed_sequences_stay_where_they_are():
    packed = pack_sequence([X[:2], X[2:5], X[5:]], enforce_sorted=False)
    moved = trees.place(packed, torch.device("meta"))
    assert isinstance(moved, PackedSequence) and moved.batch_sizes.device == CPU
    assert {t.device.type for t in (moved.data, moved.sorted_indices, moved.unsorted_indices)} == {"meta"}


def test_mappings_of_any_class_move():
    for kind in MAPPINGS:
        moved = trees.place(MAPPINGS[kind](x=X), torch.device("meta"))
        assert moved["x"].device.type == "meta", kind


def test_versions_see_writes_in_place():
    x = X.clone()
    tree = Frozen(x=x, y=[Y])
    before = trees.versions(tree)
    x.mul_(2)
    assert [a != b for a, b in zip(before, trees.versions(tree), strict=True)] == [True, False]
    with torch.inference_mode():
        assert trees.versions(torch.zeros(2)) == [0]


# -- fingerprints ---------------------------------------------------------------------------------------------------------------


def batches(order, size, x=X, y=Y):
    return [(x[k], y[k]) for k in torch.as_tensor(order).split(size)]


def prints(data):
    return [fingerprint(batch, len(batch[-1])) for batch in data]


@given(order=st.permutations(range(6)), size=st.integers(1, 6), large=st.sampled_from([1.0, 1e-3, 1e6]))
@settings(max_examples=30, deadline=None)
def test_rows_are_the_same_in_any_order_and_any_split(order, size, large):
    x = X.double() * large
    reference = total(prints(batches(range(6), 4, x)))
    assert same_rows(total(prints(batches(order, size, x))), reference)


@given(order=st.permutations(range(6)))
@settings(max_examples=30, deadline=None)
def test_another_order_within_a_batch_is_seen(order):
    (first,), (second,) = prints(batches(range(6), 6)), prints(batches(order, 6))
    assert same_rows(first, second)
    assert same_order(first, second) == (list(order) == list(range(6)))


CHANGES = {
    "small noise": lambda x, y: (x + 1e-6 * torch.randn_like(x), y),
    "small noise under large labels": lambda x, y: (x + 1e-4 * torch.randn_like(x), y),
    "labels": lambda x, y: (x, y.roll(1) + (torch.arange(6) == 0)),
    "another pairing": lambda x, y: (x, y.roll(1)),
    "an exchange of columns": lambda x, y: (x.roll(1, 1), y),
    "a sign": lambda x, y: (-x, y),
    "an imaginary part": lambda x, y: (torch.complex(x.real, x.imag + 1), y),
    "infinite entries": lambda x, y: (x.masked_fill(torch.tensor([True, False, False]), -torch.inf), y),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change):
    x, y = X.double(), Y
    if "imaginary" in change:
        x = torch.complex(x, 0 * x)
    if "large" in change:
        y = 100_000 + Y
    changed = CHANGES[change](x, y)
    for wrap in (tuple, list, lambda pair: Frozen(x=pair[0], y=pair[1]), lambda pair: Bag(*pair)):
        before, after = (fingerprint(wrap(pair), 6) for pair in ((x, y), changed))
        assert not same_rows(after, before) and same_order(before, before)


def test_infinite_entries_and_other_layouts_are_equal_to_themselves():
    masked = X.masked_fill(X > 0, -torch.inf).masked_fill(X < -1, torch.nan)
    for x in (masked, X.to_sparse(), X.to(torch.complex64).conj(), X[:0], torch.tensor(3.0), X > 0):
        assert same_order(fingerprint((x, Y), 6), fingerprint((x, Y), 6))
    assert same_rows(fingerprint((X.to_sparse(), Y), 6), fingerprint((X, Y), 6))


# -- passes ---------------------------------------------------------------------------------------------------------------------


class Passes:
    """Another list of batches in every pass."""

    def __init__(self, *passes):
        self.passes = iter(passes)

    def __iter__(self):
        return iter(next(self.passes))


def read(data, **options):
    return list(data.read(CPU, **options))


def test_order_counts_only_where_it_matters():
    flipped = batches([1, 0, 2, 3, 4, 5], 6)
    data = Data(Passes(batches(range(6), 6), flipped, flipped, batches(range(6), 6)), None, True)
    read(data), read(data)
    with pytest.raises(ProblemError, match=r"order.*shuffle=False.*list\(loader\)"):
        read(data, order_matters=True)
    read(data, order_matters=True)


def test_other_samples_are_seen_without_an_order():
    data = Data(Passes(batches(range(6), 3), [(X, Y.roll(1))]), None, True)
    read(data)
    with pytest.raises(ProblemError, match="differ from the first pass"):
        read(data)


def test_a_second_pass_without_samples_is_told_from_empty_data():
    data = Data(Passes(batches(range(6), 3), [], []), None, True)
    read(data)
    with pytest.raises(ProblemError, match=r"only once.*list\(data\).*starts anew"):
        read(data)
    for empty in ([], Passes([])):
        with pytest.raises(ProblemError, match="empty"):
            read(Data(empty, None, True))


def test_arrays_are_to_be_converted():
    pair = X.numpy(), Y.numpy()
    for batch in (pair, {"x": pair[0], "y": pair[1]}):
        with pytest.raises(ProblemError, match=r"torch\.from_numpy"):
            read(Data(batch, None, True))
    assert isinstance(pair[0], np.ndarray)


def test_a_tuple_of_batches_is_to_be_a_list():
    with pytest.raises(ProblemError, match=r"one batch; a list of batches is written \[\.\.\.\]"):
        read(Data(tuple(batches(range(6), 2)), None, True))
    with pytest.raises(ProblemError, match="cannot tell the target") as caught:
        read(Data((X, X, Y), None, True))
    assert "written" not in str(caught.value)
