"""Long vectors: lengths, inner products and memory are those of plain float64 arithmetic."""

from __future__ import annotations

import pytest
import torch

from curvalg.tensors.spaces import long_vectors

ALIGNMENT, dot, lengths = long_vectors.ALIGNMENT, long_vectors.dot, long_vectors.lengths
parts, vacant = long_vectors.parts, long_vectors.vacant

SIZES = (0, 1, 4095, 4096, 4097, 70_000)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_are_exact_to_rounding_at_all_scales(size: int, scale: float, dtype: torch.dtype) -> None:
    rows = (scale * torch.randn(3, size, dtype=torch.float64)).to(dtype)
    wanted = rows.double().norm(dim=1)
    torch.testing.assert_close(lengths(rows), wanted, rtol=1e-7, atol=0)


def test_lengths_of_rows_with_one_entry_at_another_scale() -> None:
    rows = 1e-25 * torch.ones(2, 5000)
    rows[0, 3], rows[1, 4999] = 1.0, 1e30
    torch.testing.assert_close(lengths(rows), rows.double().norm(dim=1), rtol=1e-7, atol=0)


def test_lengths_of_entries_that_are_not_finite() -> None:
    rows = torch.ones(2, 5000)
    rows[0, 0], rows[1, 4999] = torch.nan, torch.inf
    assert lengths(rows).isnan()[0] and lengths(rows).isinf()[1]


def test_lengths_of_rows_that_are_not_contiguous() -> None:
    rows = torch.randn(10_000, 3).T
    torch.testing.assert_close(lengths(rows), rows.double().norm(dim=1), rtol=1e-7, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_dots_are_summed_in_double(size: int) -> None:
    x, y = torch.randn(2, size)
    torch.testing.assert_close(dot(x, y), torch.dot(x.double(), y.double()), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("rows", [0, 1, 7, 5000])
def test_parts_cover_every_entry_once(rows: int) -> None:
    seen = torch.zeros(100_001, dtype=torch.int64)
    for part in parts(len(seen), rows, seen.device):
        seen[part] += 1
    assert bool((seen == 1).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [10, 2_000_001])
def test_vacant_memory_is_aligned_contiguous_and_whole(dtype: torch.dtype, size: int) -> None:
    memory = vacant(3, size, torch.empty(0, dtype=dtype))
    assert memory.shape == (3, size) and memory.dtype == dtype and memory.is_contiguous()
    assert memory.storage_offset() == 0 and memory.untyped_storage().nbytes() == 3 * size * dtype.itemsize
    assert size == 10 or memory.data_ptr() % ALIGNMENT == 0
    memory.fill_(2)
    assert bool((memory == 2).all())
