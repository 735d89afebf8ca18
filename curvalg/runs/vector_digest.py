"""Fingerprints of vectors and weights that do not depend on how their numbers are dealt out to processes.

Each number is hashed with its place in the whole, and the hashes are summed modulo a prime: in any order, and by any process.
Where c processes hold a number, each adds the c-th part of its hash, which a prime modulus has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvalg.problem import Problem, Snapshot
from curvalg.runs.sealed import digest
from curvalg.tensors.bits import as_integers
from curvalg.tensors.memory import wide
from curvalg.tensors.spaces import VectorSpace

PRIME = 2**31 - 1
"""Sums of residues over processes are exact in double precision, in which vector spaces take them."""
LIMBS = 4
"""Residues of a fingerprint: one in 2¹²⁴ pairs of different vectors has the same."""
AT_ONCE = 2**18
"""Numbers that are hashed at a time."""
WAVES = 4
"""Vectors that a space is projected on."""

Runs = Sequence[tuple[int, int]]


def vectors_digest(vectors: Tensor, space: VectorSpace, dim: int = 1) -> str:
    """A hash of the bits of vectors, the same on any number of processes.

    Args:
        vectors: as rows (m, n), or with ``dim=0`` as columns (n, m).
        space: that they are in; all processes that hold parts of them call this.
        dim: the axis along which numbers lie.
    """
    if space.whole:
        return digest(vectors)
    rows = vectors if dim else vectors.T
    counts = None if space.copies is None else space.copies.cpu()
    sums = torch.zeros(LIMBS, dtype=torch.float64, device="cpu")
    for number, row in enumerate(rows):
        sums += _residues(row, space.pieces, counts, number)
    return (
        f"{len(rows)} vectors of {space.size} {str(vectors.dtype).removeprefix('torch.')}: {_text(space.total(sums))}"
    )


def state_digest(problem: Problem, snapshot: Snapshot) -> str:
    """A hash of all parameters and buffers, the same however the parameters are sharded."""
    state, model = snapshot.state, problem.model
    parts = {name: found for name in sorted(state) if (found := model.places(name)) is not None}
    whole = digest(*(state[name] for name in sorted(state) if name not in parts))
    if not parts:
        return whole
    sums = torch.zeros(LIMBS, dtype=torch.float64, device="cpu")
    for number, (name, (runs, copies)) in enumerate(parts.items()):
        sums += _residues(state[name].detach().reshape(-1), runs, torch.tensor([copies], device="cpu"), number)
    return f"{whole} {_text(problem.vectors.total(sums))}"


def span_sums(rows: Tensor, space: VectorSpace) -> list[list[float]] | str:
    """What identifies the space that orthonormal rows (m, n) span: a hash; where each process has a part of them, sums.

    The basis is computed, so that its last bits depend on the processes. The squared lengths of the projections of fixed
    waves on the space do not, and are given with how far those of the same space may be apart.
    """
    if space.whole:
        return digest(rows)
    runs = [torch.arange(at, at + length, device="cpu") for at, length in space.pieces]
    places = torch.cat([torch.arange(0, device="cpu"), *runs]).double()
    waves = torch.stack([torch.cos((1 + wave) * (1 + places)) for wave in range(WAVES)]).to(wide(rows))
    lengths = space.inner(rows, waves.to(rows)).square().sum(0)
    allowed = torch.finfo(rows.dtype).eps ** 0.5
    return [[float(length), allowed * (len(rows) + float(length))] for length in lengths]


def _residues(numbers: Tensor, runs: Runs, copies: Tensor | None, salt: int) -> Tensor:
    """Sums of the hashes of numbers (n,), each over the number of processes that hold it: (LIMBS,) below the prime.

    Args:
        numbers: that this process holds.
        runs: (first place in the whole, length) of the numbers, one after the other.
        copies: how many processes hold each, (n,) or (1,); None: this one alone.
        salt: of what the numbers are, among several things.
    """
    sums = torch.zeros(LIMBS, dtype=torch.int64, device="cpu")
    for part, places in _in_parts(numbers, runs):
        hashed = as_integers(numbers[part].cpu().contiguous()).long()
        hashed = _mixed(hashed + _mixed(places + (salt << 44)))
        shares = None if copies is None else _inverses(copies if len(copies) == 1 else copies[part])
        for limb in range(LIMBS):
            hashed = _mixed(hashed + limb)
            found = (hashed & (2**62 - 1)) % PRIME
            sums[limb] += (found if shares is None else found * shares % PRIME).sum() % PRIME
    return sums % PRIME


def _in_parts(numbers: Tensor, runs: Runs) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the numbers, with the place of each number in the whole."""
    first, length = (torch.tensor([run[i] for run in runs], dtype=torch.int64, device="cpu") for i in range(2))
    ends = length.cumsum(0)
    for at in range(0, len(numbers), AT_ONCE):
        index = torch.arange(at, min(at + AT_ONCE, len(numbers)), device="cpu")
        run = torch.searchsorted(ends, index, right=True)
        yield slice(at, at + len(index)), first[run] + index - (ends - length)[run]


def _mixed(x: Tensor) -> Tensor:
    """Integers mixed so that each bit depends on all (splitmix64 of Steele, Lea and Flood, 2014); sums wrap around."""
    x = x - 0x61C8864680B583EB
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Integers shifted to the right, with zeros from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _inverses(copies: Tensor) -> Tensor:
    """The inverses of small positive integers modulo the prime."""
    values, index = torch.unique(copies, return_inverse=True)
    inverses: Tensor = torch.tensor([pow(int(value), -1, PRIME) for value in values], device="cpu")[index]
    return inverses


def _text(sums: Tensor) -> str:
    return "".join(f"{int(total) % PRIME:08x}" for total in sums)
