"""The reference of public names: a page for each public module, from its ``__all__``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from curvalg_docs.files import write

MODULES: dict[str, str] = {
    "curvalg": "Expressions, problems and operators",
    "curvalg.estimate": "Estimates from products",
    "curvalg.differentiable": "Curvature with gradients",
    "curvalg.distributed": "Several processes",
    "curvalg.planning": "Plans of runs",
    "curvalg.registry": "Terms by name",
    "curvalg.losses": "Losses with closed forms",
    "curvalg.integrations.huggingface": "Hugging Face models",
    "curvalg.testing": "The conformance kit of plugins",
    "curvalg.errors": "Exceptions and warnings",
    "curvalg_plugins.kronecker": "Kronecker-factored matrices",
    "curvalg_plugins.diagonal": "Diagonals",
    "curvalg_plugins.differences": "The Hessian by differences of gradients",
    "curvalg_plugins.hierarchical": "The hierarchical decomposition",
    "curvalg_plugins.ntk": "Neural tangent kernels",
    "curvalg_plugins.projections": "Random projections of gradients",
    "curvalg_plugins.laplace": "Laplace approximations",
}
"""Public modules, and what each is for."""


def public(module: str) -> list[str]:
    """The public names of a module."""
    found = importlib.import_module(module)
    given = getattr(found, "__all__", None)
    if given is None:  # a module of classes alone
        given = [n for n, value in vars(found).items() if inspect.isclass(value) and value.__module__ == module]
    return [name for name in given if not isinstance(getattr(found, name), ModuleType)]


def names() -> Iterator[tuple[str, str, object]]:
    """(module, name, object) of everything public, each object at its first home."""
    seen: set[int] = set()
    # Exceptions are documented beside each other, wherever else they can be imported from.
    for module in ("curvalg.errors", *(m for m in MODULES if m != "curvalg.errors")):
        for name in public(module):
            value = getattr(importlib.import_module(module), name)
            if id(value) not in seen:
                seen.add(id(value))
                yield module, name, value


@cache
def homes() -> dict[str, str]:
    """Name -> where it is documented."""
    found: dict[str, str] = {}
    for module, name, _ in names():
        found.setdefault(name, f"{module}.{name}")
    return found


def _entry(module: str, name: str, value: object) -> list[str]:
    if inspect.isclass(value) and issubclass(value, Warning | Exception):
        return [f".. autoexception:: {module}.{name}", "   :show-inheritance:", ""]
    if inspect.isclass(value):
        bases = [] if value.__bases__ == (object,) else ["   :show-inheritance:"]
        return [f".. autoclass:: {module}.{name}", "   :members:", *bases, ""]
    if callable(value) and (inspect.isroutine(value)):
        return [f".. autofunction:: {module}.{name}", ""]
    return [f".. autodata:: {module}.{name}", "   :no-value:", ""]


def page(module: str) -> str:
    """The page of one module, as reStructuredText."""
    lines = [module, "=" * len(module), "", f".. module:: {module}", ""]
    lines += [(inspect.getdoc(importlib.import_module(module)) or "").partition(">>>")[0].strip(), ""]
    for home, name, value in names():
        if home == module:
            lines += _entry(module, name, value)
    return "\n".join(lines)


def write_pages(folder: Path) -> None:
    """Write the index and a page for each module."""
    lines = ["API", "===", "", "Every public name. What is not listed here may change without notice.", ""]
    lines += [".. list-table::", ""]
    for module, purpose in MODULES.items():
        write(folder / f"{module}.rst", page(module))
        lines += [f"   * - :doc:`{module}`", f"     - {purpose}"]
    lines += ["", ".. toctree::", "   :hidden:", "", *(f"   {module}" for module in MODULES), ""]
    write(folder / "index.rst", "\n".join(lines))
