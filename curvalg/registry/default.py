"""The default registry. Editors read ``default.pyi`` beside it, which has the options of every term that curvalg brings."""

from __future__ import annotations

from curvalg.registry.registry import Registry

default = Registry()
"""The registry behind the functions of :mod:`curvalg.registry`."""

build = default.build
