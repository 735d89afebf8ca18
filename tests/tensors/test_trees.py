"""Trees of tensors: taken apart, put together, moved and watched."""

from __future__ import annotations

from collections import ChainMap, OrderedDict, UserDict, defaultdict
from collections.abc import MutableMapping
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from curvalg.tensors import trees
from tests.support.small_rows import CPU, Bag, Frozen, X, Y


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
