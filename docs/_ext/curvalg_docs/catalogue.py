"""The catalogue of matrices: a page for every registered term, from its docstring and from a small problem."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from curvalg import CurvatureOperator, Facts, LossFacts, registry
from curvalg.expr.terms import ALIASES
from curvalg.losses import CrossEntropy, GaussianNLL
from curvalg_docs import pictures
from curvalg_docs.files import write
from curvalg_docs.problem import small_problem

LOSSES: tuple[tuple[str, LossFacts | None], ...] = (
    ("any loss", None),
    ("a convex loss (cross-entropy)", CrossEntropy().facts),
    ("a loss that is not convex (Gaussian NLL)", GaussianNLL().facts),
)
BATCHES = 3


@dataclass(frozen=True)
class Cost:
    """Passes over the data, counted as calls of the model per batch.

    Args:
        first: of the first product.
        further: of one more product.
        without: of one more product where nothing is kept.
    """

    first: float
    further: float
    without: float


def names() -> list[str]:
    """Every registered term, aliases left out."""
    return [name for name in registry.names() if name not in ALIASES]


def cost(name: str) -> Cost:
    """Counted on the small problem in three batches."""
    counts = []
    for cache in ("auto", 0):
        problem = small_problem(batches=BATCHES, cache=cache, verify=False)
        op = registry.build(name).lower(problem)
        v = torch.ones(op.shape[1], dtype=problem.dtype)
        for _ in range(2):
            counts.append(_calls(problem, op, v) / BATCHES)
    return Cost(counts[0], counts[1], counts[3])


def _calls(problem: Any, op: CurvatureOperator, v: torch.Tensor) -> int:
    """How often a product calls the model."""
    calls = [0]

    def count(module: torch.nn.Module, *_: Any) -> None:
        if isinstance(module, torch.nn.Sequential):
            calls[0] += 1

    # A hook on the model would be one more thing of the user's that operators compare; a global one is not.
    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        _ = op @ v
    finally:
        handle.remove()
    return calls[0]


def _tri(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[value]


def _facts(name: str) -> list[str]:
    lines = [
        ".. list-table::",
        "   :header-rows: 1",
        "",
        "   * - for",
        "     - symmetric",
        "     - positive semi-definite",
    ]
    expr = registry.build(name)
    for label, loss in LOSSES:
        facts: Facts = expr.facts(loss)
        lines += [f"   * - {label}", f"     - {_tri(facts.symmetric)}", f"     - {_tri(facts.psd)}"]
    return lines


def _options(name: str) -> list[str]:
    options = registry.spec(name).options
    if not options:
        return ["None."]
    lines = [".. list-table::", "   :header-rows: 1", "", "   * - option", "     - values", "     - default"]
    for option in options:
        default = "must be given" if option.required else f"``{option.default!r}``"
        lines += [f"   * - ``{option.name}``", f"     - {values(option.annotation)}", f"     - {default}"]
    return lines


def values(annotation: str) -> str:
    """What an option may be, as markup: the choices of a ``Literal``, or the type."""
    if annotation.startswith("Literal[") and annotation.endswith("]"):
        return ", ".join(f"``{choice!r}``" for choice in ast.literal_eval(f"({annotation[8:-1]},)"))
    return f"``{annotation}``"


def _home(name: str) -> str:
    factory: Any = registry.spec(name).factory
    return f"{factory.__module__}.{factory.__qualname__}"


def _heading(title: str, mark: str) -> list[str]:
    return [title, mark * len(title), ""]


def page(name: str) -> str:
    """The page of one term, as reStructuredText."""
    spec = registry.spec(name)
    found = cost(name)
    expr = registry.build(name)
    aliases = [f"``{alias}``" for alias, target in ALIASES.items() if target == name]
    source = "built in" if spec.origin == "built-in" else f"a plugin of {spec.distribution}"
    also = f" Also called {', '.join(aliases)}." if aliases else ""
    rows, columns = expr.codomain or "any", expr.domain or "any"
    lines = [
        f".. _catalogue-{name}:",
        "",
        *_heading(name, "="),
        f"``registry.build({name!r})``, shown in formulas as :math:`{expr._repr_latex_().strip('$')}`; from {columns} to "
        f"{rows}; {source}.{also}",
        "",
        f".. docstring:: {_home(name)}",
        "",
        f".. figure:: {name}.png",
        f"   :alt: Entries and spectrum of {name} on the catalogue's small problem",
        "",
        "   Entries (linear within a thousandth of the largest, logarithmic beyond) and spectrum on the",
        "   :ref:`catalogue's small problem <catalogue-problem>`.",
        "",
        *_heading("Options", "-"),
        *_options(name),
        "",
        *_heading("Facts", "-"),
        *_facts(name),
        "",
        *_heading("Cost", "-"),
        "Model calls per batch, counted on the small problem without what is verified once: "
        f"{found.first:.3g} for the first product (with what is tried "
        f"once and kept), {found.further:.3g} for each further one, {found.without:.3g} for a product with ``cache=0``.",
        "",
        "What a product of it is planned as:",
        "",
        ".. code-block:: text",
        "",
        *(f"   {line}" for line in _plan(name)),
        "",
    ]
    return "\n".join(lines)


def _plan(name: str) -> list[str]:
    """The lines under "plan" of ``explain()``, before any product."""
    lines = registry.build(name).lower(small_problem()).explain().splitlines()
    start = lines.index("plan") + 1
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith(" ")), len(lines))
    return [line[2:] for line in lines[start:end]]


def index() -> str:
    """The table of all terms."""
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 26 60 14", ""]
    lines += ["   * - name", "     - matrix", "     - picture"]
    for name in names():
        summary = registry.spec(name).summary
        lines += [
            f"   * - :ref:`{name} <catalogue-{name}>`",
            f"     - {summary}",
            f"     - .. image:: {name}-small.png",
            f"          :alt: Entries of {name}",
            f"          :target: {name}.html",
            "          :width: 90px",
        ]
    return "\n".join([*lines, "", ".. toctree::", "   :hidden:", "", *(f"   {name}" for name in names()), ""])


INTRODUCTION = """.. _catalogue:

Catalogue of matrices
=====================

Every matrix that is registered where this page was built. :func:`curvalg.registry.names` lists those of your installation,
and ``curvalg terms`` does on the command line. D is the number of parameters, M the number of outputs of all samples, C the
number of classes.

.. _catalogue-problem:

All pictures are of one small problem: a network 4-5-3 with tanh, three overlapping classes of six samples each, mean
cross-entropy, after thirty steps of gradient descent. Rows and columns follow ``named_parameters()``, and outputs the data.

"""


def write_pages(folder: Path) -> None:
    """Write the index, a page for each term, and the pictures."""
    problem = small_problem()
    for name in names():
        write(folder / f"{name}.rst", page(name))
        op = registry.build(name).lower(problem)
        pictures.draw(op, folder / f"{name}.png")
        pictures.draw_small(op, folder / f"{name}-small.png")
    write(folder / "index.rst", INTRODUCTION + index())
