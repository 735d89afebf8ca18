"""Spaces of vectors: a part of a vector has the numbers of the whole one, and sums are those of plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from curvalg.tensors.spaces import ShardedSpace, Summand, VectorSpace

SIZE = 10_007
CUTS = {
    "whole": [[(0, SIZE)]],
    "halves": [[(0, 5000)], [(5000, 5007)]],
    "inside of tiles": [[(at, min(3, SIZE - at)) for at in range(first, SIZE, 9)] for first in (0, 3, 6)],
    "out of order": [[(9000, 1007), (17, 4500)], [(0, 17)], [], [(4517, 4483)]],
    "shared": [[(0, 6000)], [(4000, 6007)]],
}


class Alone:
    """The exchanges of a single process."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        return tensor


def space(pieces: list[tuple[int, int]]) -> ShardedSpace:
    return ShardedSpace(SIZE, pieces, Alone())


def cut(rows: Tensor, pieces: list[tuple[int, int]]) -> Tensor:
    return torch.cat([rows[:, :0], *(rows[:, at : at + length] for at, length in pieces)], 1)


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("draw", ["normals", "signs"])
def test_a_part_of_a_random_vector_has_the_numbers_of_the_whole_one(name: str, draw: str) -> None:
    rows = getattr(VectorSpace(SIZE), draw)("key", 2, 5)
    for pieces in CUTS[name]:
        assert torch.equal(getattr(space(pieces), draw)("key", 2, 5), cut(rows, pieces))


@pytest.mark.parametrize("name", CUTS)
def test_unit_vectors_are_cut_like_others(name: str) -> None:
    eye = torch.eye(SIZE, dtype=torch.float64)[4990:5020]
    for pieces in CUTS[name]:
        assert torch.equal(space(pieces).units(4990, 5020, eye), cut(eye, pieces))


def test_each_vector_has_numbers_of_its_own() -> None:
    whole = VectorSpace(SIZE)
    rows = whole.normals("key", 0, 3)
    assert torch.equal(whole.normals("key", 1, 3), rows[1:])
    others = torch.cat([rows, whole.normals("other", 0, 2), whole.signs("key", 0, 1)]).double()
    lengths = others.norm(dim=1)
    cosines = others @ others.T / lengths[:, None] / lengths
    assert float(cosines.fill_diagonal_(0).abs().max()) < 0.05
    # Nor are the tiles of a vector alike.
    tiles = rows[:, : 2 * 4096].double().reshape(-1, 4096)
    assert float((tiles @ tiles.T / 4096).fill_diagonal_(0).abs().max()) < 0.08


@pytest.mark.parametrize("size", [1, 5, 300, SIZE])
def test_numbers_have_the_right_moments(size: int) -> None:
    count = 400_000 // size
    normals, signs = VectorSpace(size).normals("a", 0, count).double(), VectorSpace(size).signs("a", 0, count)
    error = (size * count) ** -0.5
    assert abs(float(normals.mean())) < 5 * error and abs(float(normals.var()) - 1) < 8 * error
    assert abs(float((normals**4).mean()) - 3) < 50 * error
    assert abs(float(signs.mean())) < 5 * error and bool((signs.abs() == 1).all())


SUMS: dict[str, Callable[[VectorSpace, Tensor], Tensor]] = {
    "dots": lambda s, x: s.dots(x.T, x.flip(0).T),
    "dots of rows": lambda s, x: s.dots(x, x.flip(0), 1),
    "norms": lambda s, x: s.norms(x.T),
    "norms of rows": lambda s, x: s.norms(x, 1),
    "lengths": lambda s, x: s.lengths(x),
    "squares": lambda s, x: s.joined(s.squares_part(x))[0],
    "wide norms": lambda s, x: s.wide_norms(x),
    "gram": lambda s, x: s.gram(x, x.flip(0)),
    "inner": lambda s, x: s.inner(x, x.flip(0)),
    "dot": lambda s, x: s.total(s.dot_part(x[0], x[1])),
    "peaks": lambda s, x: s.peaks(x.T),
    "anywhere": lambda s, x: s.anywhere(x.T > 4),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SUMS)
def test_sums_are_those_of_whole_vectors(name: str, dtype: torch.dtype, weighted: bool) -> None:
    rows = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    pieces, weights = [(0, SIZE)], None
    if weighted:  # the middle is held twice
        pieces, weights = [(0, 6000), (4000, SIZE - 4000)], torch.ones(SIZE + 2000, dtype=torch.float64)
        weights[4000:8000] = 0.5
    here = ShardedSpace(SIZE, pieces, Alone(), weights)
    found, wanted = SUMS[name](here, cut(rows, pieces)), SUMS[name](VectorSpace(SIZE), rows)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    torch.testing.assert_close(
        found, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-3 * (dtype != torch.float64)
    )


def test_sums_that_travel_together_come_back_as_they_were() -> None:
    parts = [torch.tensor(2.0), torch.ones(2, 3, dtype=torch.float64), torch.zeros(0), torch.tensor([3, 4])]
    for found, given in zip(space([(0, SIZE)]).totals(*parts), parts, strict=True):
        assert torch.equal(found, given) and found.dtype == given.dtype
    roots = space([(0, SIZE)]).joined(Summand(torch.tensor([4.0, 9.0]), torch.sqrt), Summand(torch.tensor(1.0)))
    assert roots[0].tolist() == [2.0, 3.0] and float(roots[1]) == 1


def test_numbers_that_are_none_are_infinite_on_all_processes() -> None:
    assert space([(0, SIZE)]).most(torch.tensor([torch.nan, torch.inf, 1.0, -torch.inf])).tolist() == [
        torch.inf,
        torch.inf,
        1.0,
        -torch.inf,
    ]


@pytest.mark.parametrize(
    ("pieces", "weights", "words"),
    [
        ([(0, SIZE + 1)], None, "within 10007 numbers"),
        ([(-1, 3)], None, "within 10007 numbers"),
        ([(0, 3), (5, 2)], torch.ones(4), "expected 5 weights"),
    ],
)
def test_pieces_and_weights_fit(pieces: list[tuple[int, int]], weights: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ShardedSpace(SIZE, pieces, Alone(), weights)
