"""The reference of public names: a page for each public module, from its ``__all__``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from curvalg_docs import plain
from curvalg_docs.files import write
from curvalg_docs.made import MADE

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

GROUPS: dict[str, tuple[str, ...]] = {
    "Problems and operators": ("Problem", "CurvatureOperator", "Layout", "parse", "load", "save"),
    "Functions of matrices": (
        "inverse",
        "sqrt",
        "inv_sqrt",
        "diagonal_part",
        "block_diagonal",
        "restrict",
        "nystrom",
    ),
    "Matrices of arrays": ("Identity", "Zero", "Diagonal", "Kronecker", "LowRank", "Eigenbasis"),
    "What functions and operators give": (
        "Expr",
        "Facts",
        "Eigh",
        "MatrixBlock",
        "Block",
        "Entries",
        "DiagonalPart",
        "DiagonalEstimate",
        "SquareRoot",
        "Nystrom",
    ),
    "For authors of matrices": (
        "Term",
        "DatasetTerm",
        "MatrixTerm",
        "GradientTerm",
        "Batch",
        "LayerRecord",
        "FactorPairs",
        "GradientField",
        "LossFacts",
    ),
}
"""The names of ``curvalg`` itself in the order in which a reader meets them. A name that is missing here comes last."""

VALUES: dict[str, str] = {
    "SUPPORTED_API": "The version of the contract of terms that this curvalg speaks, which a plugin names.",
    "default": "The registry that the functions of this module act on.",
    "CHECKS": "The checks of the kit by name, each a function of a term and a problem that raises where the term breaks it.",
}
"""What plain values are, which have no docstrings of their own."""


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
        options = ["   :members:"]
        if any(base.__name__ in homes() for base in value.__bases__):
            options += ["   :show-inheritance:"]
        if name in MADE and dataclasses.is_dataclass(
            value
        ):  # a field whose default has a docstring would be there twice
            options += [f"   :exclude-members: {', '.join(field.name for field in dataclasses.fields(value))}"]
        return [f".. autoclass:: {module}.{name}", *options, ""]
    if callable(value) and (inspect.isroutine(value)):
        return [f".. autofunction:: {module}.{name}", ""]
    if name in VALUES:
        return [f".. py:data:: {name}", f"   :module: {module}", "", f"   {VALUES[name]}", ""]
    return [f".. autodata:: {module}.{name}", "   :no-value:", ""]


def groups(module: str) -> dict[str, list[tuple[str, object]]]:
    """The names of a page, under their headings: first what users call, then what they are given."""
    found = {name: value for home, name, value in names() if home == module}
    result: dict[str, list[tuple[str, object]]] = {}
    if module == "curvalg":
        for title, members in GROUPS.items():
            result[title] = [(name, found.pop(name)) for name in members]
    given = {name: value for name, value in found.items() if name in MADE}
    called = [item for item in found.items() if item[0] not in given]
    classes = {inspect.isclass(value) for _, value in called}
    result["Functions and classes" if len(classes) > 1 else "Classes" if True in classes else "Functions"] = called
    result["What they return"] = list(given.items())
    return {title: members for title, members in result.items() if members}


def summary(name: str, value: object) -> str:
    """The first sentence of a docstring, with its prose escaped."""
    text = VALUES.get(name) or plain.escape((inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " "))
    return re.split(r"(?<=[^.]\.)\s", text)[0]


def _table(module: str, members: list[tuple[str, object]]) -> list[str]:
    lines = [".. list-table::", "   :class: summary", "   :widths: auto", ""]
    for name, value in members:
        lines += [f"   * - :py:obj:`~{module}.{name}`", f"     - {summary(name, value)}"]
    return [*lines, ""]


def page(module: str) -> str:
    """The page of one module, as reStructuredText: a table of all names, then each of them."""
    lines = [module, "=" * len(module), "", f".. module:: {module}", ""]
    lines += [(inspect.getdoc(importlib.import_module(module)) or "").partition(">>>")[0].strip(), ""]
    found = groups(module)
    for title, members in found.items():
        lines += [f".. rubric:: {title}", ""] if len(found) > 1 else []
        lines += _table(module, members)
    for title, members in found.items():
        lines += [title, "-" * len(title), ""] if len(found) > 1 else []
        for name, value in members:
            lines += _entry(module, name, value)
    return "\n".join(lines)


def _short(module: str) -> str:
    """The name of a module where a menu is narrow."""
    return module if module.count(".") < 2 else module.partition(".")[2]


def write_pages(folder: Path) -> None:
    """Write the index and a page for each module."""
    lines = ["API", "===", "", "Every public name. What is not listed here may change without notice.", ""]
    lines += [".. list-table::", "   :class: summary", "   :widths: auto", ""]
    for module, purpose in MODULES.items():
        write(folder / f"{module}.rst", page(module))
        lines += [f"   * - :doc:`{module}`", f"     - {purpose}"]
    lines += ["", ".. toctree::", "   :hidden:", "", *(f"   {_short(module)} <{module}>" for module in MODULES), ""]
    write(folder / "index.rst", "\n".join(lines))
