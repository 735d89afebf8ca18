"""Terms are values: hashable, comparable, picklable, and what they print reads back."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

from curvalg.expr import NamedExpr
from curvalg.registry.parse import parse
from curvalg.testing.outcome import Failure, NotApplicable
from curvalg.testing.subject import Subject

_FROZEN = "Decorate the class with @dataclass(frozen=True) and keep its options in hashable fields"


def value(subject: Subject) -> None:
    """Equal options make equal terms of equal hash, other options make others; nothing can be set afterwards."""
    term = subject.term
    try:
        hash(term)
    except TypeError as error:
        raise Failure("a hashable term", f"TypeError: {error}", f"{_FROZEN} (tuples, not lists)") from error
    twin = copy.deepcopy(term)
    if twin != term or hash(twin) != hash(term):
        raise Failure("a copy that is equal, with the same hash", "a copy that differs", _FROZEN)
    if term == object() or term is None:
        raise Failure("a term unequal to other objects", "one that equals them", "Leave __eq__ to @dataclass")
    if isinstance(term, NamedExpr):
        _frozen_dataclass(term)


def _frozen_dataclass(term: NamedExpr) -> None:
    params: Any = type(term).__dict__.get("__dataclass_params__")
    if params is None or not params.frozen:
        raise Failure("a frozen dataclass", f"the class {type(term).__name__}, which is none", _FROZEN)
    for field in dataclasses.fields(term):  # type: ignore[arg-type]  # it is a dataclass
        other = _changed(term, field)
        if other is not None and other == term:
            raise Failure(
                f"another value of {field.name!r} to make another term",
                f"{term!r} equal to {other!r}, so that what is kept for one would be used for the other",
                f"Remove compare=False from {field.name!r}, or __eq__ from the class",
            )


def substance(subject: Subject) -> None:
    """The matrix is not zero on every problem: a misspelt method, or a forgotten return, gives a term that does nothing."""
    if not isinstance(subject.term, NamedExpr):
        raise NotApplicable("an expression may cancel")
    if not any(bool(case.matrix.any()) for case in subject.cases):
        raise Failure(
            "a matrix that is not zero on at least one problem",
            f"zeros on all {len(subject.cases)}",
            "Look at the names of the methods (cotangent, cotangent_dot; accumulate, finish), and whether each returns "
            "its result",
        )


def _changed(term: NamedExpr, field: dataclasses.Field[Any]) -> NamedExpr | None:
    """The term with another value of one option, where one can be guessed."""
    old = getattr(term, field.name)
    if not field.init or not isinstance(old, (bool, int, float)):
        return None
    new = (not old) if isinstance(old, bool) else old + 1
    try:
        other: Any = dataclasses.replace(term, **{field.name: new})  # type: ignore[type-var]
    except Exception:  # a guessed value may be one that the term refuses
        return None
    return None if getattr(other, field.name) == old else other


def pickling(subject: Subject) -> None:
    """Pickling gives an equal term that prints the same."""
    term = subject.term
    cure = "Define the class at the top level of a module, and keep no functions or open files in its fields"
    try:
        twin = pickle.loads(pickle.dumps(term))
    except Exception as error:  # which one depends on what is inside
        raise Failure("a picklable term", f"{type(error).__name__}: {error}", cure) from error
    if twin != term or hash(twin) != hash(term) or str(twin) != str(term):
        raise Failure(f"an equal term back, {term}", f"{twin}", f"{cure}; leave __reduce__ and __setstate__ alone")


def text(subject: Subject) -> None:
    """Text, tree and LaTeX exist, on one line where one is expected."""
    term = subject.term
    shown = str(term)
    if not shown or not repr(term) or "\n" in shown or " at 0x" in shown:
        raise Failure(
            "a short text such as 'my_term(k=3)'",
            repr(shown)[:200],
            "Leave __str__ and __repr__ to the base class, and give options a repr of one line",
        )
    for what, got in (("tree()", term.tree()), ("_repr_latex_()", term._repr_latex_())):
        if not got.strip("$ \n"):
            raise Failure(f"a text from {what}", "nothing", "Leave it to the base class; set `symbol` for LaTeX")


def parsing(subject: Subject) -> None:
    """Registered terms are read back from what they print."""
    if subject.spec is None and not isinstance(subject.given, str):
        raise NotApplicable("the term is not registered")
    shown = str(subject.term)
    cure = (
        "Options must be literals (numbers, strings, booleans, None, tuples of them) that __init__ takes as they are stored; "
        "where __post_init__ changes one, changing it again must change nothing"
    )
    try:
        back = parse(shown)
    except Exception as error:  # the term's own __post_init__ may raise anything
        raise Failure(
            f"parse({shown!r}) to give the term", f"{type(error).__name__}: {error}".splitlines()[0], cure
        ) from error
    if back != subject.term or str(back) != shown:
        raise Failure(f"parse({shown!r}) to give the term", f"{back}", cure)


def description(subject: Subject) -> None:
    """Registered terms say in one line what they are."""
    if subject.spec is None:
        raise NotApplicable("the term is not registered")
    if not subject.spec.summary:
        raise Failure(
            f"a description of {subject.spec.name!r} for lists of terms",
            "none",
            "Begin the docstring of the class or function with one line that says what the matrix is",
        )
