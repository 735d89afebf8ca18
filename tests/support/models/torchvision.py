"""torchvision beside a build of torch that its compiled operators do not fit."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec

import torch

MOST = 64
"""Operators that are declared before giving up."""


def make_importable() -> None:
    """Declare the operators that torchvision looks for when it is imported, where its compiled library could not be loaded.

    Libraries import torchvision for images that no test has. Nothing is done where it is not installed, or can be imported.
    """
    if find_spec("torchvision") is None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for _ in range(MOST):
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library.define(f"{missing[1]}() -> ()")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            break
    _KEPT.append(library)  # operators go with it


_KEPT: list[torch.library.Library] = []
