"""The files of a run whose vectors lie in parts on several processes: one of each process, all of one moment.

The file of the first process is that of the run. It names the others, by their checksums too, so that files of two moments are
never taken for one state. They are written to one of two slots in turn: those that the file of the run names stay as they are
until it names the new ones.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from curvalg.errors import CheckpointError
from curvalg.runs.run_file import flush
from curvalg.runs.sealed import OpenFile, open_sealed, write_sealed

PIECES = "pieces"
SLOTS = ("a", "b")
Pieces = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Parts:
    """What the file of a run says of the others.

    Args:
        size: numbers of a whole vector.
        axes: names of the tensors that are vectors -> the axis along which their numbers lie.
        pieces: runs (first place in a whole vector, length) that the tensors of this very file have.
        others: names and checksums of the files of the other processes, in their order.
        slot: that these are in.
    """

    size: int
    axes: dict[str, int]
    pieces: list[list[int]]
    others: list[list[str]]
    slot: str

    @classmethod
    def fits(cls, value: object) -> bool:
        """Whether what a header holds says so."""
        if not isinstance(value, dict) or value.keys() != cls.__dataclass_fields__.keys():
            return False
        size, axes, others = value["size"], value["axes"], value["others"]
        return (
            type(size) is int
            and isinstance(axes, dict)
            and all(type(axis) is int and axis in (0, 1) for axis in axes.values())
            and _are_pieces(value[PIECES], size)
            and isinstance(others, list)
            and all(isinstance(o, list) and len(o) == 2 and all(isinstance(text, str) for text in o) for o in others)
            and all(Path(name).name == name for name, _ in others)
            and value["slot"] in SLOTS
        )


class ShardFiles:
    """The files of the processes of one run.

    Args:
        path: of the file of the run.
        given: the name that the user gave it, for messages.
        rank: of this process.
        world: the number of processes.
        pieces: runs (first place in a whole vector, length) of the numbers that it holds.
        size: numbers of a whole vector.
    """

    def __init__(self, path: Path, given: str, rank: int, world: int, pieces: Pieces, size: int) -> None:
        self._path, self._given, self._rank, self._world = path, given, rank, world
        self._pieces, self._size = [list(piece) for piece in pieces], size

    def require_place(self) -> None:
        """Raise where this process cannot write.

        Raises:
            CheckpointError: there is no such folder here, or none that may be written in.
        """
        folder = self._path.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise CheckpointError(
                f"expected a folder that each process can write in, as each writes a file of its own beside {self._given}, but "
                f"for rank {self._rank} there is none at {folder}; name a file in a folder that all processes share"
            )

    # -- writing --------------------------------------------------------------------------------------------------------

    def write(self, slot: str, tensors: Mapping[str, Tensor]) -> str:
        """Write the tensors of this process, unless it is the first, whose are in the file of the run; the checksum.

        Raises:
            OSError, SafetensorError: they could not be written.
        """
        if not self._rank:
            return ""
        path = self._path.with_name(self._name(self._rank, slot))
        seal = write_sealed(path, json.dumps({PIECES: self._pieces}), tensors)
        flush(path)
        return seal

    def parts(self, slot: str, axes: Mapping[str, int], seals: Sequence[str]) -> dict[str, Any]:
        """What the file of the run says of the others, given the checksums of all processes."""
        others = [[self._name(rank, slot), seal] for rank, seal in enumerate(seals) if rank]
        return {"size": self._size, "axes": dict(axes), PIECES: self._pieces, "others": others, "slot": slot}

    def sweep(self, kept: Sequence[Sequence[str]]) -> None:
        """Remove files of processes, of this run or of one that was killed, but for those that the file of the run names."""
        names, form = {name for name, _ in kept}, re.compile(self._form)
        with contextlib.suppress(OSError):  # what is left costs room only
            for path in self._path.parent.iterdir():
                if form.fullmatch(path.name) and path.name not in names:
                    path.unlink(missing_ok=True)

    def _name(self, rank: int, slot: str) -> str:
        return f"{self._path.stem}.rank-{rank}-of-{self._world}.{slot}{self._path.suffix}"

    @property
    def _form(self) -> str:
        stem, suffix = re.escape(self._path.stem), re.escape(self._path.suffix)
        return rf"{stem}\.rank-\d+-of-\d+\.[{''.join(SLOTS)}]{suffix}"

    # -- reading --------------------------------------------------------------------------------------------------------

    def are_own(self, parts: Parts) -> bool:
        """Whether the file of this rank holds the very numbers that this process holds.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        if len(parts.others) != self._world - 1:
            return False
        if not self._rank:
            return parts.pieces == self._pieces
        with self._opened(parts, self._rank) as file:
            return bool(file.header[PIECES] == self._pieces)

    def own(self, parts: Parts) -> dict[str, Tensor]:
        """The tensors of the file of this rank.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        with self._opened(parts, self._rank) as file:
            tensors = dict(file)
            if not file.sealed(tensors):
                raise self._damaged(parts, self._rank, "its checksum is another")
            return tensors

    def require_whole(self, parts: Parts) -> None:
        """Raise where a file of others is damaged; each process looks at some of them.

        Raises:
            CheckpointError: one is missing or damaged.
        """
        for rank in range(1 + self._rank, 1 + len(parts.others), self._world):
            with self._opened(parts, rank) as file:
                if not file.sealed():
                    raise self._damaged(parts, rank, "its checksum is another")

    def gathered(self, parts: Parts) -> dict[str, Tensor]:
        """The tensors that this process would have written, from the files of all: only the numbers that it holds are read.

        Raises:
            CheckpointError: one is missing or damaged.
        """
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(self._opened(parts, rank)) for rank in range(1 + len(parts.others))]
            held = [parts.pieces, *(file.header[PIECES] for file in files[1:])]
            covers = _disjoint(held)
            if sum(cover.length for cover in covers) != self._size or parts.size != self._size:
                raise self._damaged(parts, 0, f"its files have no vectors of {self._size} numbers")
            cuts = list(_cuts(self._pieces, covers))
            lengths = [sum(length for _, length in pieces) for pieces in held]
            first = files[0]
            return {
                name: _cut_together(files, lengths, name, parts.axes[name], cuts) if name in parts.axes else first[name]
                for name in first
            }

    @contextlib.contextmanager
    def _opened(self, parts: Parts, rank: int) -> Iterator[OpenFile]:
        """The file of a rank, once it is the one that is meant."""
        path = self._path.with_name(parts.others[rank - 1][0]) if rank else self._path
        if not path.is_file():
            raise CheckpointError(
                f"{self._given} was written by {1 + len(parts.others)} processes, but rank {self._rank} finds no file {path} "
                f"of rank {rank}; put all of them into one folder that every process reaches, or delete {self._given} to begin "
                "anew"
            )
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open_sealed(path))
                if rank and not _are_pieces(file.header[PIECES], parts.size):
                    raise ValueError("it does not say which numbers it has")
            except Exception as error:  # whatever a reader trips over, the file is not what was written
                raise self._damaged(parts, rank, f"{type(error).__name__}: {error}") from error
            if rank and file.seal != parts.others[rank - 1][1]:
                raise CheckpointError(
                    f"{path} was written at another moment than {self._given}, which it belongs to; put the files of one "
                    f"moment there, or delete {self._given} to begin anew"
                )
            try:
                yield file
            except SafetensorError as error:
                raise self._damaged(parts, rank, str(error)) from error

    def _damaged(self, parts: Parts, rank: int, reason: str) -> CheckpointError:
        name = parts.others[rank - 1][0] if rank else self._path.name
        return CheckpointError(
            f"expected the part of rank {rank} of the checkpoint {self._given}, but {self._path.with_name(name)} is something "
            f"else or damaged ({reason}), and is left as it is; name another file, or delete {self._given} to begin anew"
        )


@dataclass(frozen=True)
class _Cover:
    """Numbers of a whole vector and where they are found.

    Args:
        place: the first of them.
        length: how many.
        file: that has them.
        at: where in that file.
    """

    place: int
    length: int
    file: int
    at: int


def _are_pieces(value: object, size: int) -> bool:
    return isinstance(value, list) and all(
        isinstance(piece, list)
        and len(piece) == 2
        and all(type(n) is int and n >= 0 for n in piece)
        and sum(piece) <= size
        for piece in value
    )


def _disjoint(held: Sequence[Sequence[Sequence[int]]]) -> list[_Cover]:
    """The numbers of a whole vector in their order, each once, however many files have it.

    Args:
        held: the pieces of each file.
    """
    found: list[_Cover] = []
    for file, pieces in enumerate(held):
        at = 0
        for place, length in pieces:
            found.append(_Cover(place, length, file, at))
            at += length
    covers, end = [], 0
    for cover in sorted(found, key=lambda one: one.place):
        skipped = max(0, end - cover.place)
        if cover.length > skipped:
            covers.append(_Cover(cover.place + skipped, cover.length - skipped, cover.file, cover.at + skipped))
            end = cover.place + cover.length
    return covers


def _cuts(pieces: Sequence[Sequence[int]], covers: Sequence[_Cover]) -> Iterator[tuple[int, int, int]]:
    """(file, where in it, length) of the numbers of some pieces, one after the other."""
    places = [cover.place for cover in covers]
    for place, length in pieces:
        end = place + length
        while place < end:
            cover = covers[bisect.bisect_right(places, place) - 1]
            into = place - cover.place
            some = min(end - place, cover.length - into)
            yield cover.file, cover.at + into, some
            place += some


def _cut_together(
    files: Sequence[OpenFile], lengths: Sequence[int], name: str, axis: int, cuts: Sequence[tuple[int, int, int]]
) -> Tensor:
    """One tensor of vectors from the files that have parts of it."""
    slices = [file.slices(name) for file in files]
    shapes = [list(one.get_shape()) for one in slices]
    empty: Callable[[Any], Tensor] = (lambda one: one[0:0]) if axis == 0 else (lambda one: one[:, 0:0])
    if all(shape[axis] == 0 for shape, length in zip(shapes, lengths, strict=True) if length):
        return empty(slices[0]).clone()  # nothing was computed yet
    shape = shapes[0]
    shape[axis] = sum(length for _, _, length in cuts)
    made, done = torch.empty(shape, dtype=empty(slices[0]).dtype, device="cpu"), 0
    for file, at, length in cuts:
        some, there = slice(at, at + length), slice(done, done + length)
        if axis:
            made[:, there] = slices[file][:, some]
        else:
            made[there] = slices[file][some]
        done += length
    return made
