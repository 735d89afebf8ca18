"""Files of tensors that are known to be whole: safetensors with a header and a checksum of everything."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
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


def write_sealed(path: Path, header: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with a header, which is JSON, and the checksum of both.

    Raises:
        OSError, SafetensorError: it could not be written.
    """
    plain = _separate({name: t.detach().to("cpu").contiguous() for name, t in tensors.items()})
    save_file(plain, path, {KEY: header, SUM: _checksum(header, plain)})


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
    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        header = json.loads(metadata[KEY])
        # Own memory: tensors of a file lie at any address, and the bits of a sum may depend on that.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    whole = metadata == {KEY: metadata[KEY], SUM: _checksum(metadata[KEY], tensors)}
    return SealedFile(header, tensors, whole)


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return digest(*(tensors[name] for name in names), text=json.dumps([header, names]))


def library_version() -> str:
    """The version of this library."""
    version: str = importlib.import_module("curvalg").__version__  # loaded already, as the parent of this package
    return version


def digest(*tensors: torch.Tensor, text: str = "") -> str:
    """A hash of the contents of tensors, bit for bit, and of a text."""
    total = hashlib.blake2b(text.encode(), digest_size=16)
    for t in tensors:
        plain = t.detach().to("cpu").contiguous()
        total.update(f"{plain.dtype} {tuple(plain.shape)};".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return total.hexdigest()
