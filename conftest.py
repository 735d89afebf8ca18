"""What pytest collects of the package itself."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore: list[str] = []

if find_spec("laplace") is None:
    collect_ignore.append("curvalg_plugins/laplace/backend.py")  # imports laplace-torch

if find_spec("transformers") is None:
    collect_ignore.append("curvalg/integrations/huggingface.py")  # its examples are of real models
else:
    from tests.support.models.torchvision import make_importable

    make_importable()
