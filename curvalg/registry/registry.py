"""The registry, which maps names to terms."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

from curvalg.errors import CurvalgError, RegistryError, TermOptionError
from curvalg.expr.node import Expr
from curvalg.expr.term import NamedExpr
from curvalg.expr.terms import ALIASES, BUILTIN
from curvalg.registry.discovery import FIRST_PARTY, Plugin, canonical_qualified, cure, discover, load
from curvalg.registry.spec import (
    RESERVED,
    Factory,
    TermSpec,
    checked_options,
    did_you_mean,
    options_of,
    refused_name,
    refused_result,
    summary_of,
)

F = TypeVar("F", bound=Factory)


class Registry:
    """Terms by name, from three sources: built-ins, plugins, and registrations of the running program.

    A built-in's short name always means the built-in unless :meth:`register` replaced it, and so does one that curvalg itself
    brings as a plugin: what is installed never changes the meaning of an expression. Other plugins answer to their short name
    where it is free, and always to ``distribution/name``.

    >>> registry = Registry()
    >>> print(registry.build("empirical_fisher"))
    covariance
    """

    def __init__(self) -> None:
        self._registered: dict[str, TermSpec] = {}
        self._loaded: dict[Plugin, TermSpec] = {}
        self._found: tuple[tuple[Plugin, ...], dict[str, str]] | None = None

    # -- building ------------------------------------------------------------------------------------------------------

    def build(self, name: str, /, **options: Any) -> Expr:
        """Build the expression of this name.

        Args:
            name: a short name, or ``distribution/name``.
            options: the term's options, by name.

        Returns:
            the expression; it prints by the name it was built by (an alias by its canonical name).

        Raises:
            RegistryError: an unknown or ambiguous name, a plugin that cannot be imported, or options that do not fit.

        >>> print(Registry().build("ggn_mc", samples=2))
        ggn_mc(samples=2)
        """
        spec, label, plugin = self._resolve(name)
        arguments = checked_options(spec, options)
        built = _call(spec, arguments, plugin)
        if isinstance(built, NamedExpr) and (built.__class__ is spec.factory or _reads_back(spec, built)):
            # A copy: a factory may hand out one shared instance, which must not be renamed under its other users.
            return copy.copy(built).labelled(label)
        return built

    def spec(self, name: str) -> TermSpec:
        """The registry's entry for a term; imports its plugin.

        Args:
            name: a short name, or ``distribution/name``.

        Raises:
            RegistryError: an unknown or ambiguous name, or a plugin that cannot be imported.

        >>> Registry().spec("hessian").origin
        'built-in'
        """
        return self._resolve(name)[0]

    def describe(self, name: str) -> str:
        """A term's options, summary and origin, a few lines to read.

        Args:
            name: a short name, or ``distribution/name``.

        Raises:
            RegistryError: an unknown or ambiguous name, or a plugin that cannot be imported.

        >>> print(Registry().describe("residual").splitlines()[0])
        residual()
        """
        return self.spec(name).describe()

    # -- listing -------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every name that can be built, sorted; a plugin whose short name is taken is listed by its qualified name.

        Reads metadata alone and imports no plugin.

        >>> "hessian" in Registry().names()
        True
        """
        return sorted({*BUILTIN, *ALIASES, *self._registered, *map(self._listed, self._valid())})

    def failures(self) -> dict[str, str]:
        """Messages on every plugin that cannot be used, by name. Imports all plugins; never raises.

        >>> isinstance(Registry().failures(), dict)
        True
        """
        plugins, problems = self._discovered()
        failed = dict(problems)
        for plugin in plugins:
            try:
                self._load(plugin)
            except RegistryError as error:
                failed[self._listed(plugin)] = str(error)
        return failed

    def refresh(self) -> None:
        """Forget what was read of installed plugins; it is read again at the next use. Registrations stay."""
        importlib.invalidate_caches()
        self._found = None
        self._loaded.clear()

    # -- registering ---------------------------------------------------------------------------------------------------

    @overload
    def register(self, name: str, factory: None = None, *, replace: bool = False) -> Callable[[F], F]: ...
    @overload
    def register(self, name: str, factory: F, *, replace: bool = False) -> F: ...
    def register(self, name: str, factory: F | None = None, *, replace: bool = False) -> F | Callable[[F], F]:
        """Give a term a name in this program; also a decorator, ``@register("name")``.

        Args:
            name: a Python identifier that is no word of the expression syntax.
            factory: a frozen dataclass deriving from Term or one of its relatives, or a function that returns an
                expression; its parameters are the options.
            replace: take over a name that exists.

        Returns:
            the factory, or the decorator.

        Raises:
            RegistryError: the name is not allowed or taken, or the factory is not one.

        >>> registry = Registry()
        >>> @registry.register("damped")
        ... def damped(damping: float = 0.1):
        ...     return registry.build("ggn") + damping * registry.build("covariance")
        >>> print(registry.build("damped", damping=0.5))
        ggn + 0.5*covariance
        """
        if factory is None:
            return lambda given: self.register(name, given, replace=replace)
        if reason := refused_name(name):
            raise TermOptionError(reason)
        if name in RESERVED:
            raise TermOptionError(f"{name!r} is a word of the expression syntax; choose another name")
        if not replace and self._taken(name):
            raise RegistryError(f"{name!r} exists already; choose another name, or pass replace=True to take it over")
        options = options_of(factory, f"term {name!r}")
        self._registered[name] = TermSpec(name, name, None, None, "registered", summary_of(factory), options, factory)
        return factory

    @contextlib.contextmanager
    def scoped(self) -> Iterator[Registry]:
        """A context at whose end every registration made inside is undone, and every replaced one restored.

        >>> registry = Registry()
        >>> with registry.scoped():
        ...     _ = registry.register("mine", lambda: registry.build("ggn"))
        >>> "mine" in registry.names()
        False
        """
        before = dict(self._registered)
        try:
            yield self
        finally:
            self._registered = before

    # -- resolving -----------------------------------------------------------------------------------------------------

    def _discovered(self) -> tuple[tuple[Plugin, ...], dict[str, str]]:
        if self._found is None:
            self._found = discover()
        return self._found

    def _valid(self) -> tuple[Plugin, ...]:
        return tuple(plugin for plugin in self._discovered()[0] if not refused_name(plugin.name))

    def _sharing(self, name: str) -> list[Plugin]:
        return [plugin for plugin in self._valid() if plugin.name == name]

    def _answering(self, name: str) -> list[Plugin]:
        """The plugins that a short name may mean: curvalg's own alone, where it has one."""
        sharing = self._sharing(name)
        return [plugin for plugin in sharing if plugin.distribution == FIRST_PARTY] or sharing

    def _taken(self, name: str) -> bool:
        return name in BUILTIN or name in ALIASES or name in self._registered or bool(self._sharing(name))

    def _listed(self, plugin: Plugin) -> str:
        name = plugin.name
        shadowed = name in BUILTIN or name in ALIASES or name in RESERVED or name in self._registered
        return name if not shadowed and self._answering(name) == [plugin] else plugin.qualified_name

    def _resolve(self, name: str) -> tuple[TermSpec, str, Plugin | None]:
        """The spec behind a name, the label of what is built by it, and the plugin that brought it."""
        if not isinstance(name, str):
            raise TermOptionError(f"expected a term's name as a string, got {type(name).__name__}")
        if "/" in name:
            return self._resolve_qualified(canonical_qualified(name))
        canonical = name if name in self._registered else ALIASES.get(name, name)
        if canonical in self._registered:
            return self._registered[canonical], canonical, None
        if canonical in BUILTIN:
            return _builtin(canonical), canonical, None
        plugins = [] if canonical in RESERVED else self._answering(canonical)
        if not plugins:
            raise RegistryError(self._unknown(name))
        if len(plugins) > 1:
            raise RegistryError(
                f"{len(plugins)} plugins are called {name!r}, and none is preferred; {_choose(plugins)}"
            )
        return self._load(plugins[0]), canonical, plugins[0]

    def _resolve_qualified(self, name: str) -> tuple[TermSpec, str, Plugin | None]:
        distribution, _, short = name.partition("/")
        if distribution == FIRST_PARTY and short in BUILTIN:
            return _builtin(short), name if short in self._registered else short, None
        plugins = [plugin for plugin in self._discovered()[0] if plugin.qualified_name == name]
        if not plugins:
            raise RegistryError(self._unknown(name))
        if len(plugins) > 1:
            values = " and ".join(plugin.value for plugin in plugins)
            raise RegistryError(
                f"{name!r} is declared more than once, as {values}; report it to the authors of {distribution}"
            )
        return self._load(plugins[0]), name, plugins[0]

    def _unknown(self, name: str) -> str:
        qualified = [plugin.qualified_name for plugin in self._valid()]
        known = self.names()
        guess = did_you_mean(name, [*known, *qualified] if "/" in name else known, cutoff=0.0)
        return (
            f"no term is called {name!r}{guess}; registry.names() and `curvalg terms` list all {len(known)}. "
            "A package's terms are there once it is installed, those of a script after registry.register(...)"
        )

    def _load(self, plugin: Plugin) -> TermSpec:
        if plugin not in self._loaded:
            if reason := refused_name(plugin.name):
                raise RegistryError(f"{plugin}: {reason}")
            factory: Any = load(plugin)
            options = options_of(factory, str(plugin))
            self._loaded[plugin] = TermSpec(
                name=plugin.name,
                qualified_name=plugin.qualified_name,
                distribution=plugin.distribution,
                version=plugin.version,
                origin="plugin",
                summary=summary_of(factory),
                options=options,
                factory=factory,
            )
        return self._loaded[plugin]


def _choose(plugins: list[Plugin]) -> str:
    return f"say which: {' or '.join(repr(plugin.qualified_name) for plugin in plugins)}"


def _builtin(name: str) -> TermSpec:
    factory = BUILTIN[name]
    version = importlib.import_module("curvalg").__version__  # loaded already, as the parent of this package
    options = options_of(factory, f"term {name!r}")
    return TermSpec(name, f"curvalg/{name}", "curvalg", version, "built-in", summary_of(factory), options, factory)


def _call(spec: TermSpec, arguments: dict[str, Any], plugin: Plugin | None) -> Expr:
    who = str(plugin) if plugin else f"term {spec.name!r}"
    try:
        built = spec.factory(**arguments)
    except CurvalgError:
        raise
    except Exception as error:
        hint = f"; {cure(plugin, error)}" if plugin else ""
        message = (
            f"{who}: building it with {arguments or 'its defaults'} failed with {type(error).__name__}: {error}{hint}"
        )
        raise RegistryError(message) from error
    if reason := refused_result(spec, built):
        raise RegistryError(f"{who}: what it built {reason}; the signature is {spec.signature}")
    return built


def _reads_back(spec: TermSpec, built: NamedExpr) -> bool:
    """Whether what a function built is built again by the options it prints, and so may bear the function's name."""
    from curvalg.expr.show.text import changed

    try:
        return bool(dataclasses.is_dataclass(built) and spec.factory(**changed(built)) == built)
    except Exception:  # a stranger's function, called with options it may never have met
        return False
