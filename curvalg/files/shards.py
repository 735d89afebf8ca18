"""Sealed files that are cut into several where they are large."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from curvalg.errors import CheckpointError
from curvalg.runs.run_file import FileName, RunFile
from curvalg.runs.sealed import digest, read_sealed, write_sealed

SHARDS = "shards"
"""The entry of the first file's header that names the others, which lie beside it."""


def write_shards(path: FileName, header: Mapping[str, Any], tensors: Mapping[str, Tensor], most: int) -> None:
    """Write a header and tensors: the file at the path, and others beside it where tensors take more than ``most`` bytes.

    At any moment the path holds either what was there before or all of the new, whole.

    Raises:
        CheckpointError: no file can be written there.
    """
    place = RunFile(path)
    first, *others = _groups(tensors, most)
    before = _shards_of(place.path)
    names = [f"{place.path.stem}.{_label(group)}{place.path.suffix}" for group in others]
    text = json.dumps({**header, SHARDS: names})
    with place.held():
        try:
            for name, group in zip(names, others, strict=True):
                RunFile(place.path.with_name(name)).replace(lambda at, group=group: write_sealed(at, "{}", group))  # type: ignore[misc]
            place.replace(lambda at: write_sealed(at, text, first))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{place.given} could not be written ({error}); make room, or name another file"
            ) from error
        for name in set(before) - set(names):
            with contextlib.suppress(OSError):
                place.path.with_name(name).unlink(missing_ok=True)


def read_shards(path: FileName) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and all tensors of a file that :func:`write_shards` wrote.

    Raises:
        CheckpointError: there is none, it is something else, or damaged; the message says which.
    """
    place = Path(path)
    if not place.is_file():
        raise CheckpointError(f"expected a file that curvalg.save wrote, but there is no file {place}; check the name")
    header, tensors = _whole(place)
    shards = header.pop(SHARDS, None)
    if not isinstance(shards, list) or not all(isinstance(name, str) and Path(name).name == name for name in shards):
        raise _foreign(place, "it does not say what other files belong to it")
    for name in shards:
        beside = place.with_name(name)
        if not beside.is_file():
            raise CheckpointError(
                f"{place} was written in {1 + len(shards)} files, but {beside} is missing; move all of them"
            )
        tensors.update(_whole(beside)[1])
    return header, tensors


def _whole(place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        file = read_sealed(place)
    except Exception as error:  # whatever a reader trips over, the file is not what was written
        raise _foreign(place, f"{type(error).__name__}: {error}") from error
    if not file.whole:
        raise _foreign(place, "its checksum is another")
    return file.header, file.tensors


def _foreign(place: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"expected a file that curvalg.save wrote, but {place} is something else or damaged ({reason}); write it again"
    )


def _groups(tensors: Mapping[str, Tensor], most: int) -> Sequence[dict[str, Tensor]]:
    """The tensors in their order, in groups of at most so many bytes where no single one has more."""
    groups: list[dict[str, Tensor]] = [{}]
    room = most
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and groups[-1]:
            groups.append({})
            room = most
        groups[-1][name] = tensor
        room -= size
    return groups


def _label(group: Mapping[str, Tensor]) -> str:
    """A name by contents, so that a new file is not written over one that the old first file names."""
    return digest(*group.values(), text=json.dumps(list(group)))[:12]


def _shards_of(place: Path) -> list[str]:
    """Names of the files that belong to the one that lies at a place now; none where it is not of this kind."""
    try:
        return [name for name in read_sealed(place).header[SHARDS] if Path(name).name == name]
    except Exception:  # there is nothing, or something else
        return []
