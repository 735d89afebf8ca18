"""The place in the code of a term's author that an exception comes from."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

import curvalg


def place(error: BaseException) -> str:
    """The place where the author's code raised an exception, or led to it; empty where it did neither."""
    ours = [str(Path(package.__file__ or "").parent) for package in (curvalg, torch)]
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [f for f in frames if not f.filename.startswith(tuple(ours))]
    return f" ({foreign[-1].filename}, line {foreign[-1].lineno}, in {foreign[-1].name})" if foreign else ""
