"""The libraries that take part: every file of this folder but ``base`` is one, by its name.

A newcomer is one file that defines one :class:`~benchmarks.peers.base.Peer`. It may import its library at the top: a library
that is not installed is left out with a message.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from benchmarks.peers.base import Peer


def names() -> list[str]:
    """All of them, curvalg first; nothing is imported."""
    found = {module.name for module in pkgutil.iter_modules(__path__)} - {"base"}
    return sorted(found, key=lambda name: (not name.startswith("curvalg"), name))


def load(name: str) -> Peer:
    """The one of this name.

    Raises:
        ImportError: its library is not installed, or cannot be imported.
    """
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    (peer,) = (c for c in classes if issubclass(c, Peer))
    return peer()


def available(wanted: Sequence[str]) -> tuple[list[Peer], dict[str, str]]:
    """Those that can take part, and why the others cannot."""
    peers, missing = [], {}
    for name in wanted:
        try:
            peers.append(load(name))
        except ImportError as error:  # broken installations too: a missing library of a library
            missing[name] = f"{name} is left out: {error}; pip install -c constraints.txt -e '.[benchmark]' brings it"
    return peers, missing


def versions(peers: Sequence[Peer]) -> dict[str, str]:
    """By distribution."""
    found = {}
    for peer in peers:
        try:
            found[peer.distribution] = version(peer.distribution)
        except PackageNotFoundError:  # run from a checkout
            found[peer.distribution] = "unknown"
    return found
