"""Checkpoint files: written atomically, resumed only by the run that they are of."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from safetensors import SafetensorError

from curvalg.distributed.group import active
from curvalg.errors import CheckpointError, CurvalgWarning
from curvalg.problem.kept.measured import Measured
from curvalg.runs.run_file import FileName, RunFile, agreed
from curvalg.runs.run_state import Named, Options, State
from curvalg.runs.sealed import library_version, read_sealed, write_sealed
from curvalg.runs.shard_files import SLOTS, Parts, ShardFiles
from curvalg.runs.unit import PowerOfTwo
from curvalg.tensors.spaces import VectorSpace

T = TypeVar("T")
Loaded = tuple[State, dict[str, Any]]

FORMAT = 6
INTERVAL = 30.0
"""The least seconds between two writes."""
FURTHEST = 4096
"""Exponents of units, in magnitude: those of float64 end before."""
OVERHEAD = 0.05
"""The most that writing may take of the time of a run."""


class Checkpoint:
    """A file that a run can be resumed from.

    The format is safetensors: the tensors of the state, and as metadata JSON with the algorithm, its options, fingerprints of
    expression and problem, and the numbers of the state, and a checksum of all that. Where each process has a part of every
    vector, there is a file of each, and that of the first process names the others: :mod:`curvalg.runs.shard_files`.

    Args:
        path: of the file, in a folder that exists; of several processes that of the first one counts.
        subject: fingerprint of what the run is about, name -> what JSON can hold.
        choices: that products depend on in their last bits.
        unit: that the numbers of states are in, found by the products.
        vectors: the space of the vectors of states; by default each process has whole ones.

    Raises:
        CheckpointError: no file can be written there, or another run writes it.
    """

    def __init__(
        self,
        path: FileName,
        subject: Options,
        choices: Measured | None = None,
        unit: PowerOfTwo | None = None,
        vectors: VectorSpace | None = None,
    ) -> None:
        self._group = active().vectors
        self._place = self._agreed(lambda: RunFile(path) if self._group.rank == 0 else None)
        self._given = os.fsdecode(path)
        self._shards: ShardFiles | None = None
        self._parts: Parts | None = None
        """What the file says of those of the other processes, as it is now."""
        if vectors is not None and not vectors.whole:
            self._shards = self._made_shards(vectors)
            subject = {**subject, "vectors": "in parts on several processes"}
        self.subject, self._unit = subject, unit
        self._choices = choices or Measured((), torch.device("cpu"))
        self._marked: tuple[dict[str, Any], int | None] = {}, None
        self._next = time.monotonic() + INTERVAL

    def _made_shards(self, vectors: VectorSpace) -> ShardFiles:
        place, given = self._group.first(("", "") if self._place is None else (str(self.path), self.place.given))
        made = ShardFiles(Path(place), given, self._group.rank, self._group.size, vectors.pieces, vectors.size)
        self._agreed(made.require_place)
        return made

    def _agreed(self, own: Callable[[], T]) -> T:
        return agreed(self._group, own)

    def held(self) -> contextlib.AbstractContextManager[None]:
        """A context in which no other run writes the file.

        Raises:
            CheckpointError: another run does.
        """
        return contextlib.nullcontext() if self._place is None else self._place.held()

    @property
    def place(self) -> RunFile:
        """The file itself, on rank 0 of the processes that share the run."""
        assert self._place is not None
        return self._place

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return self.place.path

    def due(self) -> bool:
        """Whether it is time to write the file again."""
        return bool(self._group.first(time.monotonic() >= self._next))

    def mark(self) -> None:
        """Remember choices and unit as they are with the state that was just reached; a step that is interrupted may make
        more."""
        exponent = None if self._unit is None else self._unit.exponent
        self._marked = {**self._choices.recalled, **self._choices.choices}, exponent

    def save(self, algorithm: Named, state: State, seconds: float) -> None:
        """Write a state. Where that fails, the existing file stays as it is, with only a warning: results count more."""
        begin = time.monotonic()
        header = {
            "format": FORMAT,
            "version": library_version(),
            "subject": self.subject,
            "algorithm": algorithm.name,
            "options": algorithm.options,
            "numbers": state.numbers,
            "choices": self._group.objects(self._marked[0]),
            "unit": self._marked[1],
            "seconds": seconds,
        }
        failure = self._save_parts(header, algorithm, state) if self._shards else self._replace(header, state)
        if self._place is None:
            return
        if failure:
            warnings.warn(
                f"the checkpoint {self.place.given} could not be written ({failure}); the run goes on, but can be resumed only "
                "from what was written before; make room, or make the folder again",
                CurvalgWarning,
                stacklevel=3,
            )
        took = time.monotonic() - begin
        self._next = time.monotonic() + max(INTERVAL, took / OVERHEAD)

    def _save_parts(self, header: dict[str, Any], algorithm: Named, state: State) -> str:
        """Write a file of each process, then the file that names them; why that failed on some process, "" if it did not."""
        assert self._shards is not None
        before = self._group.first(self._parts)
        slot = SLOTS[before is not None and before.slot == SLOTS[0]]
        seal, failure = "", ""
        try:
            seal = self._shards.write(slot, state.tensors)
        except (OSError, SafetensorError) as error:
            failure = f"rank {self._group.rank}: {error}"
        every = self._group.objects((seal, failure))
        failure = next((said for _, said in every if said), "")
        if not failure:
            parts = self._shards.parts(slot, algorithm.axes(state), [seal for seal, _ in every])
            failure = self._replace({**header, "shards": parts}, state)
            if not failure and self._place is not None:
                self._parts = Parts(**parts)
        now, failure = self._group.first((self._parts, failure))
        # Only now does nothing name the files of the state before, or those of a state that not all could write.
        self._shards.sweep([] if now is None else now.others)
        return failure

    def _replace(self, header: dict[str, Any], state: State) -> str:
        """Put a new file in place; why that failed, "" if it did not, or is for another process to do."""
        if self._place is None:
            return ""
        text = json.dumps({"shards": None, **header})
        try:
            self.place.replace(lambda path: write_sealed(path, text, state.tensors))
        except (OSError, SafetensorError) as error:
            return str(error)
        return ""

    def load(self, algorithm: Named) -> tuple[State, float] | None:
        """The state to go on from, with the seconds it took; None where there is no file yet.

        Raises:
            CheckpointError: the file is no checkpoint, or damaged, or of another run; the message names every difference.
        """
        options = algorithm.options  # by all processes, as they may be of vectors that these have parts of
        found = self._agreed(lambda: None if self._place is None else self._loaded(algorithm, options))
        if self._shards is not None:
            found = self._joined(self._shards, found)
            self._agreed(lambda: self._require_fitting(algorithm, found))
        else:
            found = self._group.first(found)
        if found is None:
            return None
        state, header = found
        choices = header["choices"]  # each process has its own; another number of them gives the same up to rounding
        self._choices.recalled.update(choices[self._group.rank if len(choices) == self._group.size else 0])
        if self._unit is not None:
            self._unit.exponent = header["unit"]
        return state, float(header["seconds"])

    def _joined(self, shards: ShardFiles, first: Loaded | None) -> Loaded | None:
        """The state of this process from the files of all, given what the first one read."""
        header = self._group.first(None if first is None else first[1])
        if header is None:
            return None
        parts = self._parts = Parts(**header["shards"])
        if self._group.every(self._agreed(lambda: shards.are_own(parts))):
            tensors = self._agreed(lambda: shards.own(parts) if first is None else first[0].tensors)
        else:
            self._agreed(lambda: shards.require_whole(parts))
            tensors = self._agreed(lambda: shards.gathered(parts))
        return State(tensors, header["numbers"]), header

    def _loaded(self, algorithm: Named, options: Options) -> Loaded | None:
        """The state of the file and its header, once they fit."""
        if not self.place.exists():
            return None
        header, tensors = self._read()
        asked = _described(self.subject, algorithm.name, options)
        found = list(differences(_described(header["subject"], header["algorithm"], header["options"]), asked))
        if found:
            raise CheckpointError(
                f"{self.place.given} is the checkpoint of another run: {'; '.join(found)}. Ask for the same, "
                "name another file, or delete this one"
            )
        state = State(tensors, header["numbers"])
        if (header["shards"] is None) != (self._shards is None):
            raise self._foreign("it is not of several processes")
        if self._shards is None:
            self._require_fitting(algorithm, (state, header))
        return state, header

    def _require_fitting(self, algorithm: Named, found: Loaded | None) -> None:
        if found is not None and not algorithm.fits(found[0]):
            raise self._foreign(f"it holds no state of {algorithm.name}")

    def _read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The header and tensors of a file that is whole."""
        try:
            file = read_sealed(self.place.path)
            header = file.header
            number, version = header["format"], header["version"]
        except Exception as error:  # whatever a reader trips over, the file is not what was written
            raise self._foreign(f"{type(error).__name__}: {error}") from error
        if type(number) is int and number != FORMAT:
            raise CheckpointError(
                f"{self.place.given} has checkpoint format {number}, written by curvalg {version}; this is curvalg "
                f"{library_version()}, which reads format {FORMAT}. Use that version, or name another file"
            )
        if not file.whole:
            raise self._foreign("its checksum is another")
        tensors = file.tensors
        wrong = [
            name for name in {**FIELDS, **header} if name not in header or not FIELDS.get(name, _never)(header[name])
        ]
        if wrong:
            raise self._foreign(f"unexpected entries: {', '.join(wrong)}")
        return header, tensors

    def _foreign(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"expected a checkpoint of curvalg or no file at all, but {self._given} is something else or damaged "
            f"({reason}), and is left as it is; name another file, or delete this one"
        )


def _never(_: object) -> bool:
    return False


def _is_seconds(value: object) -> bool:
    return type(value) is float and 0 <= value < math.inf


def _is(kind: type) -> Callable[[object], bool]:
    return lambda value: type(value) is kind


FIELDS: dict[str, Callable[[object], bool]] = {
    "format": lambda value: type(value) is int and value == FORMAT,
    "version": _is(str),
    "subject": _is(dict),
    "algorithm": _is(str),
    "options": _is(dict),
    "numbers": _is(dict),
    "choices": lambda value: isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value),
    "unit": lambda value: value is None or (type(value) is int and abs(value) <= FURTHEST),
    "seconds": _is_seconds,
    "shards": lambda value: value is None or Parts.fits(value),
}
"""Entries of the header -> whether a value is one."""


def _described(subject: Options, name: str, options: Options) -> dict[str, Any]:
    return {**subject, "algorithm": name, **{f"option {key}": value for key, value in options.items()}}


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """What two descriptions differ in, a line for each; sums count as the same up to rounding."""
    for name in {**stored, **asked}:
        left, right = stored.get(name), asked.get(name)
        if _are_sums(left) and _are_sums(right):
            if not same_sums(left, right):
                yield f"{name} differs"
        elif not _equal(left, right):
            yield f"{name} differs (stored: {_shown(left)}, asked: {_shown(right)})"


def _are_sums(value: Any) -> TypeGuard[list[list[float]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)


def same_sums(left: list[list[float]], right: list[list[float]]) -> bool:
    """Whether sums, each with its possible error by rounding, are the same."""
    pairs = zip(left, right, strict=False)
    return len(left) == len(right) and all(abs(a - b) <= max(most, others) for (a, most), (b, others) in pairs)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-6)
    return bool(left == right)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
