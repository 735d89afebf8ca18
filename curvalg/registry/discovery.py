"""Discovery of plugins: what installed distributions declare in the entry-point group ``curvalg.terms``.

Finding reads metadata and imports nothing. One distribution's broken metadata, or one plugin that fails to import,
never hides another.
"""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import dataclass, field
from importlib import metadata

from curvalg.errors import RegistryError

GROUP = "curvalg.terms"

FIRST_PARTY = "curvalg"
"""The distribution whose plugins keep their short names, whatever else is installed."""


@dataclass(frozen=True)
class Plugin:
    """A plugin as its entry point declares it.

    Args:
        name: the term's short name.
        distribution: the distribution that declares it, in its canonical spelling.
        version: that distribution's version.
        value: what the entry point points to, ``module:attribute``.
        entry: the entry point itself.
    """

    name: str
    distribution: str
    version: str
    value: str
    entry: metadata.EntryPoint = field(repr=False, compare=False)

    @property
    def qualified_name(self) -> str:
        """The name with its distribution, ``distribution/name``."""
        return f"{self.distribution}/{self.name}"

    def __str__(self) -> str:
        return f"term {self.name!r} of {self.distribution} {self.version} ({self.value})"


def canonical_distribution(name: str) -> str:
    """The spelling under which package indexes compare names: ``My_Pkg`` and ``my.pkg`` are ``my-pkg``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def canonical_qualified(name: str) -> str:
    """A qualified name with its distribution in canonical spelling."""
    distribution, _, short = name.partition("/")
    return f"{canonical_distribution(distribution)}/{short}"


def discover() -> tuple[tuple[Plugin, ...], dict[str, str]]:
    """Every declared plugin, by qualified name, and the distributions whose metadata cannot be read.

    Returns:
        the plugins, and place -> message for unreadable metadata.
    """
    found: dict[str, tuple[Plugin, ...]] = {}
    problems: dict[str, str] = {}
    for distribution in metadata.distributions():
        try:
            if not any(entry.group == GROUP for entry in distribution.entry_points):
                continue
            name = canonical_distribution(distribution.metadata["Name"])
            if name not in found:
                # Not this one but the one Python would use: an older copy may lie further down the path.
                found[name] = _plugins(name, metadata.distribution(name))
        except Exception as error:  # written by strangers: anything may be wrong with it
            place = str(distribution.locate_file(""))
            problems[place] = f"metadata of a distribution in {place} cannot be read: {_shown(error)}; reinstall it"
    every = (plugin for plugins in found.values() for plugin in plugins)
    return tuple(sorted(every, key=lambda plugin: (plugin.qualified_name, plugin.value))), problems


def _plugins(name: str, distribution: metadata.Distribution) -> tuple[Plugin, ...]:
    entries = (entry for entry in distribution.entry_points if entry.group == GROUP)
    return tuple({Plugin(entry.name, name, distribution.version, entry.value, entry): None for entry in entries})


def load(plugin: Plugin) -> object:
    """The object that the entry point points to; imports its module.

    Raises:
        RegistryError: it cannot be imported, or the attribute is missing; chained with the original exception.
    """
    try:
        module_name, attribute = plugin.entry.module, plugin.entry.attr
    except Exception as error:  # which one depends on the version of Python
        raise RegistryError(
            f"{plugin}: expected an entry point of the form module:attribute; {_report(plugin)}"
        ) from error
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise RegistryError(
            f"{plugin}: importing {module_name} failed with {_shown(error)}; {cure(plugin, error)}"
        ) from error
    try:
        return functools.reduce(getattr, filter(None, (attribute or "").split(".")), module)
    except Exception as error:
        raise RegistryError(
            f"{plugin}: {module_name} has no {attribute} ({_shown(error)}); the installed files do not match their "
            f"metadata: {_reinstall(plugin)}"
        ) from error


def cure(plugin: Plugin, error: BaseException) -> str:
    """The advice most likely to help against an exception raised by a plugin's code."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        own = plugin.entry.module.partition(".")[0]
        missing = error.name.partition(".")[0]
        if missing == own:
            return f"its own files are missing: {_reinstall(plugin)}"
        return f"install what it needs: pip install {missing}; or pip uninstall {plugin.distribution}"
    if isinstance(error, ImportError):
        return f"it was probably written for other versions of what it imports: {_upgrade(plugin)}"
    return f"the fault is in the plugin; {_report(plugin)}"


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _reinstall(plugin: Plugin) -> str:
    name = plugin.distribution
    return f"pip install --force-reinstall {name}, or pip uninstall {name}"


def _upgrade(plugin: Plugin) -> str:
    name = plugin.distribution
    return f"pip install --upgrade {name}, or pip uninstall {name}"


def _report(plugin: Plugin) -> str:
    return f"report it to its authors, or {_upgrade(plugin)}"
