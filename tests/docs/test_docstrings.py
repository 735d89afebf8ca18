"""Docstrings can be read alone, and error messages have one style."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from curvalg_docs import api

ROOT = Path(__file__).parents[2]
FILES = sorted(path for package in ("curvalg", "curvalg_plugins") for path in (ROOT / package).rglob("*.py"))

DEPENDENT = re.compile(r"(Of|Given|As|Also|It|Its|With|Without|By|From|Under) |(The same|None|Nothing|The most)\.$")
"""First lines that say something only beside what they belong to."""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """(line, docstring) of a module and of every class and function in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "lineno", 1), text


def messages(source: str) -> Iterator[tuple[int, str]]:
    """(line, end) of every message that is written where it is raised; of f-strings the text after the last value."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            message = node.exc.args[0]
            end = message.values[-1] if isinstance(message, ast.JoinedStr) else message
            if isinstance(end, ast.Constant) and isinstance(end.value, str):
                yield node.lineno, end.value


def incomplete(text: str) -> str:
    """What is wrong with a public docstring's first line, "" for nothing."""
    first = text.strip().split("\n")[0]
    if len(first.split()) < 4:
        return f"fewer than four words: {first!r}"
    return "" if first.endswith(".") else f"no full stop at the end of the first line: {first!r}"


def dependent(text: str) -> str:
    """What keeps a docstring from being understood alone, "" for nothing."""
    first = text.strip().split("\n")[0]
    if len(first.split()) < 3:
        return f"fewer than three words: {first!r}"
    return f"a fragment: {first!r}" if DEPENDENT.match(first) else ""


def stopped(end: str) -> str:
    """What is wrong with the end of a message, "" for nothing; three dots stand for code to be filled in."""
    return f"a full stop at the end: {end!r}" if end.endswith(".") and not end.endswith("...") else ""


def listed(found: list[str]) -> str:
    return "\n".join(["", *found])


def test_first_lines_of_public_docstrings_are_sentences():
    found = [
        f"{module}.{name}: {wrong}"
        for module, name, value in api.names()
        if (inspect.isclass(value) or inspect.isroutine(value)) and (wrong := incomplete(inspect.getdoc(value) or ""))
    ]
    assert not found, listed(found)


def test_docstrings_can_be_read_alone():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {wrong}"
        for path in FILES
        for line, text in docstrings(path.read_text(encoding="utf-8"))
        if (wrong := dependent(text))
    ]
    assert not found, listed(found)


def test_error_messages_end_without_a_full_stop():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {wrong}"
        for path in FILES
        for line, end in messages(path.read_text(encoding="utf-8"))
        if (wrong := stopped(end))
    ]
    assert not found, listed(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Its products.", "fewer than four words"),
        ("The trace of a square operator", "no full stop"),
    ],
)
def test_an_incomplete_first_line_is_seen(text, words):
    assert words in incomplete(text)


@pytest.mark.parametrize(
    "body",
    [
        '"""Bytes."""',
        'class A:\n    """Of a file that is read once."""',
        'def f():\n    """Given the loss of a problem."""',
        'async def f():\n    """The same."""',
    ],
)
def test_a_fragment_is_seen(body):
    assert [dependent(text) for _, text in docstrings(body) if dependent(text)]


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ('raise ValueError("expected a number.")', True),
        ('raise ValueError(f"expected {x}, got {y}; take it.")', True),
        ('raise ValueError("expected a number" "; take one.") from error', True),
        ('raise ValueError(f"got {x}")', False),
        ('raise ValueError("expected a number; write forward=lambda model, batch: ...")', False),
    ],
)
def test_a_full_stop_is_seen(body, wrong):
    assert bool([end for _, end in messages(body) if stopped(end)]) is wrong
