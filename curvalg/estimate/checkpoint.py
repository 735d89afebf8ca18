"""Checkpoint files: written atomically, resumed only by the run that they are of."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import curvalg
from curvalg.errors import CheckpointError
from curvalg.estimate.state import Named, Options, State

FORMAT = 2
KEY = "curvalg"
"""The entry of the file's metadata that holds everything but the tensors, as JSON."""
INTERVAL = 30.0
"""The least seconds between two writes."""
OVERHEAD = 0.05
"""The most that writing may take of the time of a run."""


@dataclass(frozen=True)
class Choices:
    """What an operator measured and chose, written with a state, and what an earlier run did, to be used again.

    Args:
        made: name -> what JSON can hold; grows with the products.
        recalled: the same of an earlier run.
    """

    made: dict[str, Any]
    recalled: dict[str, Any]


class Checkpoint:
    """A file that a run can be resumed from.

    The format is safetensors: the tensors of the state, and JSON metadata with the algorithm, its options, fingerprints of
    expression and problem, and the numbers of the state.

    Args:
        path: of the file, in a folder that exists.
        subject: fingerprint of what the run is about, name -> what JSON can hold.
        choices: that products depend on in their last bits.

    Raises:
        CheckpointError: the folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str], subject: Options, choices: Choices | None = None) -> None:
        self.path, self.subject, self._choices = Path(path), subject, choices or Choices({}, {})
        self._marked: dict[str, Any] = {}
        self._next = time.monotonic() + INTERVAL
        if not self.path.parent.is_dir():
            raise CheckpointError(
                f"expected a file name in an existing folder, got {self.path}; make {self.path.parent}"
            )
        if self.path.is_dir():
            raise CheckpointError(f"expected a file name, but {self.path} is a folder; name a file in it")

    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() >= self._next

    def mark(self) -> None:
        """Remember the choices as they are with the state that was just reached; a step that is interrupted may make more."""
        self._marked = {**self._choices.recalled, **self._choices.made}

    def save(self, algorithm: Named, state: State, seconds: float) -> None:
        """Write a state so that the file is at any moment either the old one or the new one, whole."""
        begin = time.monotonic()
        header = {
            "format": FORMAT,
            "version": curvalg.__version__,
            "subject": self.subject,
            "algorithm": algorithm.name,
            "options": algorithm.options,
            "numbers": state.numbers,
            "choices": self._marked,
            "seconds": seconds,
        }
        tensors = {name: t.detach().to("cpu").contiguous() for name, t in state.tensors.items()}
        # One name for all writes, so that killed ones do not pile up.
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            save_file(tensors, temporary, {KEY: json.dumps(header)})
            _flush(temporary)
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):  # some file systems cannot flush a folder
            _flush(self.path.parent)
        took = time.monotonic() - begin
        self._next = time.monotonic() + max(INTERVAL, took / OVERHEAD)

    def load(self, algorithm: Named) -> tuple[State, float] | None:
        """The state to go on from, with the seconds it took; None where there is no file yet.

        Raises:
            CheckpointError: the file is no checkpoint, or of another run; the message names every difference.
        """
        if not self.path.exists():
            return None
        with self._reading() as file:
            header = self._header(file.metadata())
            asked = _described(self.subject, algorithm.name, algorithm.options)
            differences = list(
                _differences(_described(header["subject"], header["algorithm"], header["options"]), asked)
            )
            if differences:
                raise CheckpointError(
                    f"{self.path} is the checkpoint of another run: {'; '.join(differences)}. Ask for the same, or name "
                    "another file"
                )
            # Own memory: tensors of a file lie at any address, and the bits of a sum may depend on that.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        self._choices.recalled.update(header["choices"])
        return State(tensors, header["numbers"]), float(header["seconds"])

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, "pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._foreign()} ({error})") from error

    def _header(self, metadata: Mapping[str, str] | None) -> dict[str, Any]:
        try:
            header = json.loads((metadata or {})[KEY])
            number, version = header["format"], header["version"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(self._foreign()) from error
        if number != FORMAT:
            raise CheckpointError(
                f"{self.path} has checkpoint format {number}, written by curvalg {version}; this is curvalg "
                f"{curvalg.__version__}, which reads format {FORMAT}. Use that version, or name another file"
            )
        return dict(header)

    def _foreign(self) -> str:
        return (
            f"expected a checkpoint of curvalg or no file at all, but {self.path} is something else or damaged, and is left "
            "as it is; name another file, or delete this one"
        )


def _described(subject: Options, name: str, options: Options) -> dict[str, Any]:
    return {**subject, "algorithm": name, **{f"option {key}": value for key, value in options.items()}}


def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    for name in {**stored, **asked}:
        left, right = stored.get(name), asked.get(name)
        if not _equal(left, right):
            yield f"{name} differs (stored: {_shown(left)}, asked: {_shown(right)})"


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-6)
    return bool(left == right)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(*tensors: torch.Tensor) -> str:
    """A hash of the contents of tensors, bit for bit."""
    import hashlib

    total = hashlib.blake2b(digest_size=16)
    for t in tensors:
        plain = t.detach().to("cpu").contiguous()
        total.update(f"{plain.dtype} {tuple(plain.shape)};".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return total.hexdigest()
