"""Every public name is documented: what it is, its arguments, shapes where it takes arrays, what it raises, its source.

A name may leave a section out only where the tables below say why.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable

import pytest
from curvalg_docs import api

import curvalg

NAMES = [(f"{module}.{name}", value) for module, name, value in api.names()]

SHAPE = re.compile(r"\([A-Za-z₁₂, ·×*.0-9−\-|]*(,|×) ?[A-Za-z₁₂, ·×*.0-9−\-|]*\)|\b[Ss]hape\b|\bD\b")
"""(n, K), (D,), (M × D), or a word about shapes."""

CITATION = re.compile(r"\b(19[4-9]\d|20[0-4]\d)\b|arXiv|Reference: ")

NO_ARGUMENTS = {
    "curvalg.DiagonalEstimate": "made by diagonal_part, which documents them",
    "curvalg.DiagonalPart": "made by diagonal_part, which documents them",
    "curvalg.Nystrom": "made by nystrom, which documents them",
    "curvalg.SquareRoot": "made by sqrt, which documents them",
    "curvalg.estimate.Density": "its rule is what it is evaluated by, and not for people",
}
"""Names whose arguments need no words, and why."""

NO_RAISES = {
    "curvalg.registry.failures": "never raises, and says so",
    "curvalg.registry.names": "reads metadata alone",
    "curvalg.registry.refresh": "forgets, and nothing can go wrong",
    "curvalg.registry.scoped": "a context that restores",
    "curvalg_plugins.ntk.ntk": "has no options",
}
"""Functions that raise nothing of their own, and why."""

NO_SOURCE = {
    "curvalg.estimate.Density": "a result; the method that makes it cites",
    "curvalg.estimate.Eigenpairs": "a result; the method that makes it cites",
    "curvalg.estimate.Estimate": "a result; the method that makes it cites",
    "curvalg.estimate.FunctionProduct": "a result; the method that makes it cites",
    "curvalg.estimate.GradientNoise": "a result; the method that makes it cites",
    "curvalg.estimate.InfluenceScores": "a result; the method that makes it cites",
    "curvalg.estimate.Ranking": "a result; the method that makes it cites",
    "curvalg.estimate.RankError": "a result; the method that makes it cites",
    "curvalg.estimate.ScoreBatch": "a result; the method that makes it cites",
    "curvalg.estimate.Result": "a result; the method that makes it cites",
    "curvalg.estimate.Saliency": "a result; the method that makes it cites",
    "curvalg.estimate.SingularTriplets": "a result; the method that makes it cites",
    "curvalg.estimate.bilinear": "an inner product",
    "curvalg_plugins.laplace.Prediction": "a result; the method that makes it cites",
    "curvalg.estimate.heat_map": "a picture",
    "curvalg.losses.infer_reduction": "a rule of this library",
}
"""Names of the modules below that come from no paper, and why."""

FROM_PAPERS = ("curvalg.estimate", "curvalg.losses", "curvalg_plugins.")
"""Modules whose methods have a source: a paper, or for losses the function of torch that they are."""


def text(value: object) -> str:
    return inspect.getdoc(value) or ""


def is_function(value: object) -> bool:
    return inspect.isroutine(value)


def is_exception(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, BaseException)


def is_record(value: object) -> bool:
    """A dataclass, or a class with a constructor of its own, that a person may call."""
    return inspect.isclass(value) and not is_exception(value) and not inspect.isabstract(value)


def arguments(value: object) -> list[str]:
    """The parameters of a function or a constructor, by name."""
    if dataclasses.is_dataclass(value) and inspect.isclass(value):
        inherited = {
            f.name for base in value.__mro__[1:] if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)
        }
        return [f.name for f in dataclasses.fields(value) if f.init and f.name not in inherited]
    if inspect.isclass(value) and value.__init__ is object.__init__:
        return []
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def takes_arrays(value: object) -> bool:
    annotations = inspect.get_annotations(value.__init__ if inspect.isclass(value) else value)
    return any(
        word in str(a) for n, a in annotations.items() if n != "return" for word in ("Tensor", "Vector", "ndarray")
    )


def missing(of: Callable[[object], bool], fails: Callable[[str, object], str], allowed: dict[str, str]) -> list[str]:
    found = [(name, fails(name, value)) for name, value in NAMES if of(value)]
    wrong = [f"{name}: {what}" for name, what in found if what and name not in allowed]
    needless = [
        f"{name} is allowed for, and not needed" for name in allowed if name not in {n for n, what in found if what}
    ]
    return wrong + needless


def listed(found: list[str]) -> str:
    return "\n".join(["", *found])


def test_every_public_name_is_documented_somewhere():
    documented = {name for name, _ in NAMES}
    short = {name.rpartition(".")[2] for name in documented}
    assert not [name for name in curvalg.__all__ if name not in short and f"curvalg.{name}" not in api.MODULES]
    assert not [name for module in api.MODULES for name in api.public(module) if name not in short]


def test_every_public_name_has_a_summary():
    found = [
        name for name, value in NAMES if not text(value).strip() and (inspect.isclass(value) or is_function(value))
    ]
    assert not found, listed(found)


def test_summaries_are_sentences():
    found = [
        f"{name}: {text(value).split(chr(10) * 2)[0]!r}"
        for name, value in NAMES
        if (inspect.isclass(value) or is_function(value))
        and not text(value).split("\n\n")[0].rstrip().endswith((".", ":"))
    ]
    assert not found, listed(found)


def test_arguments_are_documented():
    def fails(name: str, value: object) -> str:
        absent = [
            a
            for a in arguments(value)
            if not re.search(rf"^\s+{a}(, \w+)*: |^\s+(\w+, )+{a}(, \w+)*: ", text(value), re.M)
        ]
        return f"no word about {', '.join(absent)}" if absent else ""

    found = missing(lambda v: is_function(v) or is_record(v), fails, NO_ARGUMENTS)
    assert not found, listed(found)


def test_shapes_are_documented_where_arrays_are_taken():
    def fails(name: str, value: object) -> str:
        return "" if SHAPE.search(text(value)) else "takes arrays, and says no shapes"

    found = missing(lambda v: (is_function(v) or is_record(v)) and takes_arrays(v), fails, {})
    assert not found, listed(found)


def test_what_is_raised_is_documented():
    def fails(name: str, value: object) -> str:
        return "" if "Raises:" in text(value) else "no section Raises"

    found = missing(is_function, fails, NO_RAISES)
    assert not found, listed(found)


def test_methods_from_papers_cite_them():
    def fails(name: str, value: object) -> str:
        relevant = name.startswith(FROM_PAPERS)
        return "no source" if relevant and not CITATION.search(text(value)) else ""

    found = missing(lambda v: is_function(v) or is_record(v), fails, NO_SOURCE)
    assert not found, listed(found)


def undocumented(value: object) -> list[str]:
    """Public methods and properties that a class defines itself and says nothing about."""
    own = {
        n: v
        for n, v in vars(value).items()
        if not n.startswith("_") and (callable(v) or isinstance(v, property | classmethod))
    }
    inherited = {n for base in value.__mro__[1:] for n in vars(base)}
    return [n for n, v in own.items() if n not in inherited and not text(v)]


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, v in NAMES if inspect.isclass(v)], ids=lambda v: v if isinstance(v, str) else ""
)
def test_methods_of_public_classes_are_documented(name, value):
    assert not undocumented(value)


def test_pages_of_modules_have_every_name():
    for module in api.MODULES:
        page = api.page(module).replace("py:data:: ", f"py:data:: {module}.")
        assert all(f":: {module}.{name}\n" in page for home, name, _ in api.names() if home == module)
