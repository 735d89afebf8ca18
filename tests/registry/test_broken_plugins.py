"""A broken plugin breaks its own name alone, and the message says whose it is, why, and what helps."""

from __future__ import annotations

import re

import pytest

from curvalg.errors import ExpressionError, RegistryError
from curvalg.registry import SUPPORTED_API, Registry
from tests.support.fake_plugins import TERM, Install, new_failures

HEAD = "from dataclasses import dataclass\nfrom curvalg import Term, registry\n"
BROKEN: dict[str, tuple[str, str, type[BaseException] | None, str]] = {
    # what: (entry point, module source, cause, message)
    "missing dependency": (
        "broken:X",
        "import no_such_library.sub\n",
        ModuleNotFoundError,
        "pip install no_such_library",
    ),
    "missing module": ("not_there:X", "", ModuleNotFoundError, "pip install --force-reinstall bad-dist"),
    "missing package": ("not_there.sub:X", "", ModuleNotFoundError, "pip install --force-reinstall bad-dist"),
    "changed dependency": (
        "broken:X",
        "from math import no_such_name\n",
        ImportError,
        "pip install --upgrade bad-dist",
    ),
    "error at import": ("broken:X", "1 / 0\n", ZeroDivisionError, "division by zero.*pip install --upgrade bad-dist"),
    "syntax error": ("broken:X", "def\n", SyntaxError, "fault is in the plugin"),
    "exit at import": ("broken:X", "raise SystemExit(3)\n", SystemExit, "SystemExit: 3"),
    "attribute error at import": ("broken:X", "import math\nmath.nope\n", AttributeError, "importing broken failed"),
    "missing attribute": ("broken:X", "", AttributeError, "broken has no X.*--force-reinstall bad-dist"),
    "missing nested attribute": ("broken:A.X", "class A: pass\n", AttributeError, r"broken has no A\.X"),
    "no attribute": ("broken", "", None, "got module"),
    "not an entry point": ("bro ken:X", "", Exception, "module:attribute"),
    "not callable": ("broken:X", "X = 3\n", None, "got int"),
    "an expression": ("broken:X", HEAD + "X = registry.build('ggn')\n", None, "wrap a ready expression in a function"),
    "base class": ("broken:Term", HEAD, None, "frozen dataclass"),
    "no dataclass": ("broken:X", HEAD + "class X(Term):\n    k: int = 3\n", None, r"@dataclass\(frozen=True\)"),
    "not frozen": ("broken:X", HEAD + "@dataclass\nclass X(Term):\n    k: int = 3\n", None, "hashable"),
    "hashed but not frozen": (
        "broken:X",
        HEAD + "@dataclass(unsafe_hash=True)\nclass X(Term):\n    k: int = 3\n",
        None,
        "not a frozen dataclass",
    ),
    "no equality": ("broken:X", HEAD + "@dataclass(frozen=True, eq=False)\nclass X(Term): pass\n", None, "comparable"),
    "forgotten decorator": (
        "broken:X",
        HEAD + "from curvalg.expr import GGN\nclass X(GGN):\n    k: int = 3\n",
        None,
        "X is not a frozen dataclass",
    ),
    "other api": (
        "broken:X",
        HEAD + "@dataclass(frozen=True)\nclass X(Term):\n    api = 7\n",
        None,
        f"api 7.*api {SUPPORTED_API}.*upgrade curvalg",
    ),
    "old api": (
        "broken:X",
        HEAD + "@dataclass(frozen=True)\nclass X(Term):\n    api = 0\n",
        None,
        "api 0.*upgrade the package",
    ),
    "keywords": ("broken:x", HEAD + "def x(**options): return registry.build('ggn')\n", None, r"takes \*\*options"),
    "arguments": ("broken:x", HEAD + "def x(*values): return registry.build('ggn')\n", None, r"takes \*values"),
    "positional": ("broken:x", HEAD + "def x(a, /): return registry.build('ggn')\n", None, "positional-only"),
    "no signature": ("broken:x", "x = type\n", ValueError, "options cannot be read"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_message_says_whose_and_why(registry: Registry, install: Install, what: str) -> None:
    value, source, cause, message = BROKEN[what]
    install("bad-dist", {"bad_term": value}, {"broken": source}, version="0.9")
    install("good-dist", {"good_term": "plugin_good:MyTerm"}, {"plugin_good": TERM})
    assert {"bad_term", "good_term"} <= set(registry.names())
    for use in (registry.build, registry.spec, registry.describe):
        with pytest.raises(RegistryError, match=message) as caught:
            use("bad_term")
        for part in ("bad_term", "bad-dist", "0.9", value):
            assert part in str(caught.value)
        if cause is not None:
            assert isinstance(caught.value.__cause__, cause)
    failures = new_failures(registry)
    assert list(failures) == ["bad_term"]
    assert re.search(message, failures["bad_term"])
    assert str(registry.build("good_term")) == "good_term"
    assert str(registry.build("ggn")) == "ggn"


def test_a_plugin_that_is_mended_works_without_refresh(registry: Registry, install: Install) -> None:
    install("mended", {"mended_term": "plugin_mended:MyTerm"}, {"plugin_mended": "    import plugin_dependency" + TERM})
    with pytest.raises(RegistryError, match="pip install plugin_dependency"):
        registry.build("mended_term")
    install("dependency", {}, {"plugin_dependency": ""})
    assert str(registry.build("mended_term")) == "mended_term"


BUILDS: dict[str, tuple[str, type[BaseException] | None, str]] = {
    "no expression": ("def x(): return 3\n", None, "returned int, not an expression"),
    "nothing": ("def x(): pass\n", None, "returned NoneType"),
    "raises": ("def x(k: int = 3): raise ValueError('odd k')\n", ValueError, "ValueError: odd k"),
    "late import": ("def x():\n    import no_such_library\n", ModuleNotFoundError, "pip install no_such_library"),
    "unhashable": (
        HEAD + "@dataclass(frozen=True)\nclass x(Term):\n    ks: list | None = None\n",
        None,
        "cannot be hashed.*tuples instead of lists",
    ),
}


@pytest.mark.parametrize("what", BUILDS)
def test_faults_at_building(registry: Registry, install: Install, what: str) -> None:
    source, cause, message = BUILDS[what]
    install("bad-dist", {"bad_term": "broken:x"}, {"broken": source})
    options = {"ks": [1]} if what == "unhashable" else {}
    with pytest.raises(RegistryError, match=message) as caught:
        registry.build("bad_term", **options)
    assert "bad-dist 1.2.3" in str(caught.value)
    assert caught.value.__cause__ is None if cause is None else isinstance(caught.value.__cause__, cause)


def test_what_a_term_says_of_its_options_is_passed_on(registry: Registry) -> None:
    with pytest.raises(ExpressionError, match="samples must be a positive integer, got 0"):
        registry.build("ggn_mc", samples=0)


@pytest.mark.parametrize(
    "files",
    [
        {"metadata": ""},
        {"metadata": "Metadata-Version: 2.1\nName: unreadable\n", "entry_points": "[curvalg.terms]\nno equals sign\n"},
    ],
    ids=["no name", "no pair"],
)
def test_unreadable_metadata_hides_nobody(registry: Registry, install: Install, files: dict[str, str]) -> None:
    install("unreadable", {"bad_term": "broken:x"}, **files)
    install("good-dist", {"good_term": "plugin_good:MyTerm"}, {"plugin_good": TERM})
    assert str(registry.build("good_term")) == "good_term"
    (message,) = new_failures(registry).values()
    assert "cannot be read" in message
