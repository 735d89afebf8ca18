"""Fingerprints of data: the same rows are seen in any order and any split, and every change is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvalg.problem.data import fingerprint, same_order, same_rows, total
from tests.support.small_rows import Bag, Frozen, X, Y, batches


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
