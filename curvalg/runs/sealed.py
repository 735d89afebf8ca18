"""Files of tensors that are known to be whole: safetensors with a header and a checksum of everything."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY = "curvalg"
"""The entry of the file's metadata that holds everything but the tensors, as JSON."""
SUM = "checksum"
"""The entry that holds the checksum of that and of the tensors."""


@dataclass(frozen=True)
class SealedFile:
    """What was read from a file.

    Args:
        header: everything but the tensors.
        tensors: by name.
        whole: whether the checksum is the one that was written.
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor]
    whole: bool


class OpenFile(Mapping[str, Tensor]):
    """The tensors of an open file, each read when it is asked for.

    Args:
        file: opened by safetensors.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._metadata: dict[str, str] = file.metadata() or {}
        self.header: dict[str, Any] = json.loads(self._metadata[KEY])
        self.seal = self._metadata.get(SUM, "")
        """The checksum that was written."""

    def __getitem__(self, name: str) -> Tensor:
        # Own memory: tensors of a file lie at any address, and the bits of a sum may depend on that.
        tensor: Tensor = self._file.get_tensor(name).clone()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())

    def slices(self, name: str) -> Any:
        """A tensor of which only the parts are read that an index asks for."""
        return self._file.get_slice(name)

    def sealed(self, tensors: Mapping[str, Tensor] | None = None) -> bool:
        """Whether the checksum is that of the contents, which are read one after the other where they are not given."""
        header = self._metadata[KEY]
        return self._metadata == {KEY: header, SUM: _checksum(header, self if tensors is None else tensors)}


@contextlib.contextmanager
def open_sealed(path: Path) -> Iterator[OpenFile]:
    """Open what :func:`write_sealed` wrote.

    Raises:
        Exception: of any kind, for a file that is none of these.
    """
    with safe_open(path, "pt") as file:
        yield OpenFile(file)


def write_sealed(path: Path, header: str, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors with a header, which is JSON, and the checksum of both, which is returned.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    plain = _separate({name: t.detach().to("cpu").contiguous() for name, t in tensors.items()})
    seal = _checksum(header, plain)
    save_file(plain, path, {KEY: header, SUM: seal})
    return seal


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own, as the format wants it."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        seen.add(storage.data_ptr())
        separate[name] = tensor.clone() if shared else tensor
    return separate


def read_sealed(path: Path) -> SealedFile:
    """Read what :func:`write_sealed` wrote.

    Raises:
        Exception: of any kind, for a file that is none of these.
    """
    with open_sealed(path) as file:
        tensors = dict(file)
        return SealedFile(file.header, tensors, file.sealed(tensors))


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return _digest((tensors[name] for name in names), json.dumps([header, names]))


def library_version() -> str:
    """The version of this library."""
    version: str = importlib.import_module("curvalg").__version__  # loaded already, as the parent of this package
    return version


def digest(*tensors: torch.Tensor, text: str = "") -> str:
    """A hash of the contents of tensors, bit for bit, and of a text."""
    return _digest(tensors, text)


def _digest(tensors: Iterable[Tensor], text: str) -> str:
    total = hashlib.blake2b(text.encode(), digest_size=16)
    for t in tensors:
        plain = t.detach().to("cpu").contiguous()
        total.update(f"{plain.dtype} {tuple(plain.shape)};".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return total.hexdigest()
