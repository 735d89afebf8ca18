"""Plugins are found without importing them, and imported one by one."""

from __future__ import annotations

import pickle
import sys

import pytest

from curvalg import parse
from curvalg.errors import RegistryError
from curvalg.expr import GGN
from curvalg.registry import Registry
from tests.support.fake_plugins import TERM, Install, new_failures


def test_names_import_nothing_and_building_imports_one(registry: Registry, install: Install) -> None:
    install("one-dist", {"one_term": "plugin_one:MyTerm"}, {"plugin_one": TERM})
    install("two-dist", {"two_term": "plugin_two:MyTerm"}, {"plugin_two": TERM})
    names = registry.names()
    assert names == sorted(names)
    assert {"one_term", "two_term", "hessian", "empirical_fisher"} <= set(names)
    assert not {"plugin_one", "plugin_two"} & set(sys.modules)
    registry.build("hessian")
    with pytest.raises(RegistryError):
        registry.build("three_term")
    assert not {"plugin_one", "plugin_two"} & set(sys.modules)
    registry.build("one_term", k=4)
    assert "plugin_one" in sys.modules
    assert "plugin_two" not in sys.modules


def test_label_is_the_name_it_was_built_by(registry: Registry, install: Install) -> None:
    install(
        "My_Dist.x", {"my_term": "plugin_label:MyTerm", "other_name": "plugin_label:MyTerm"}, {"plugin_label": TERM}
    )
    assert str(registry.build("my_term", k=4)) == "my_term(k=4)"
    assert str(registry.build("my_term")) == "my_term"
    assert str(registry.build("other_name", k=4)) == "other_name(k=4)"
    assert str(registry.build("my-dist-x/my_term", k=4)) == "term('my-dist-x/my_term', k=4)"
    assert str(registry.build("my-dist-x/my_term")) == "term('my-dist-x/my_term')"
    assert str(registry.build("My_Dist.x/my_term")) == "term('my-dist-x/my_term')"
    assert registry.build("my-dist-x/my_term") == registry.build("my_term")
    for name in ("my_term", "other_name", "my-dist-x/my_term"):
        expr = 2 * registry.build(name, k=4, name_of="a'b") @ GGN()
        assert parse(str(expr), registry=registry) == expr
        assert str(parse(str(expr), registry=registry)) == str(expr)
        assert str(pickle.loads(pickle.dumps(expr))) == str(expr)


def test_spec_and_description_of_a_plugin(registry: Registry, install: Install) -> None:
    install("my-dist", {"my_term": "plugin_spec:MyTerm"}, {"plugin_spec": TERM})
    spec = registry.spec("my_term")
    assert (spec.name, spec.qualified_name, spec.distribution) == ("my_term", "my-dist/my_term", "my-dist")
    assert (spec.version, spec.origin, spec.summary) == ("1.2.3", "plugin", "A term of a plugin.")
    assert spec.signature == "my_term(k: int = 3, name_of: str | None = None)"
    assert registry.spec("my-dist/my_term") == spec
    shown = registry.describe("my_term")
    assert shown.split("\n")[0] == spec.signature
    for part in ("A term of a plugin.", "my-dist 1.2.3", "plugin", "my-dist/my_term"):
        assert part in shown


def test_what_is_installed_later_is_seen_after_refresh(registry: Registry, install: Install) -> None:
    assert "late_term" not in registry.names()
    install("late-dist", {"late_term": "plugin_late:MyTerm"}, {"plugin_late": TERM})
    assert "late_term" not in registry.names()
    registry.refresh()
    assert "late_term" in registry.names()


def test_refresh_keeps_registrations(registry: Registry) -> None:
    registry.register("mine", GGN)
    registry.refresh()
    assert registry.build("mine") == GGN()


def test_only_the_copy_that_python_would_import_counts(registry: Registry, install: Install) -> None:
    install("copied", {"old_term": "plugin_old:MyTerm", "kept_term": "plugin_old:MyTerm"}, {"plugin_old": TERM})
    install("copied", {"kept_term": "plugin_new:MyTerm"}, {"plugin_new": TERM}, version="2.0")
    assert "old_term" not in registry.names()
    assert registry.spec("kept_term").version == "2.0"


def test_a_newer_copy_may_have_dropped_a_term(registry: Registry, install: Install) -> None:
    install("copied", {"old_term": "plugin_old:MyTerm"}, {"plugin_old": TERM})
    install("copied", {}, version="2.0")
    assert "old_term" not in registry.names()


def test_other_groups_are_not_ours(registry: Registry, install: Install) -> None:
    install("other", {}, entry_points="[console_scripts]\nfoo = bar:baz\n[curvalg.termsx]\nfoo = bar:baz\n")
    assert "foo" not in registry.names()
    assert new_failures(registry) == {}


def test_two_plugins_of_one_name(registry: Registry, install: Install) -> None:
    install("b-dist", {"shared": "plugin_b:MyTerm"}, {"plugin_b": TERM})
    install("a-dist", {"shared": "plugin_a:MyTerm"}, {"plugin_a": TERM})
    with pytest.raises(RegistryError, match=r"'a-dist/shared' or 'b-dist/shared'"):
        registry.build("shared")
    assert not {"plugin_a", "plugin_b"} & set(sys.modules)
    names = registry.names()
    assert "shared" not in names
    assert {"a-dist/shared", "b-dist/shared"} <= set(names)
    assert type(registry.build("a-dist/shared")).__module__ == "plugin_a"
    assert type(registry.build("b-dist/shared")).__module__ == "plugin_b"


def test_one_distribution_declaring_a_name_twice(registry: Registry, install: Install) -> None:
    install("twice", {}, {"plugin_twice": TERM}, entry_points="[curvalg.terms]\nx = plugin_twice:MyTerm\nx = other:X\n")
    for name in ("x", "twice/x"):
        with pytest.raises(RegistryError):
            registry.build(name)


@pytest.mark.parametrize("name", ["ggn", "empirical_fisher"])
def test_a_plugin_never_takes_a_builtin_name(registry: Registry, install: Install, name: str) -> None:
    before = registry.build(name)
    install("greedy", {name: "plugin_greedy:MyTerm"}, {"plugin_greedy": TERM})
    registry.refresh()
    assert registry.build(name) == before
    assert registry.spec(name).origin == "built-in"
    assert "plugin_greedy" not in sys.modules
    assert f"greedy/{name}" in registry.names()
    assert str(registry.build(f"greedy/{name}")) == f"term('greedy/{name}')"


def test_a_plugin_called_as_a_word_of_the_syntax(registry: Registry, install: Install) -> None:
    install("wordy", {"inverse": "plugin_wordy:MyTerm"}, {"plugin_wordy": TERM})
    assert "inverse" not in registry.names()
    assert str(registry.build("wordy/inverse")) == "term('wordy/inverse')"


@pytest.mark.parametrize("name", ["my-term", "3d", "lambda", "a b"])
def test_a_plugin_with_an_invalid_name_is_refused(registry: Registry, install: Install, name: str) -> None:
    install("odd", {name: "plugin_odd:MyTerm"}, {"plugin_odd": TERM})
    assert not [listed for listed in registry.names() if name in listed]
    with pytest.raises(RegistryError, match=r"odd 1\.2\.3.*Python identifier"):
        registry.build(f"odd/{name}")
    assert list(new_failures(registry)) == [f"odd/{name}"]
    with pytest.raises(RegistryError, match="no term is called"):
        registry.build(name)


def test_a_name_of_curvalg_stays_its_own(registry: Registry, install: Install) -> None:
    own = registry.build("kfac")
    install("some-dist", {"kfac": "some_kfac:MyTerm", "fresh": "some_kfac:MyTerm"}, {"some_kfac": TERM})
    registry.refresh()
    assert registry.build("kfac") == own
    assert registry.spec("kfac").distribution == "curvalg"
    assert "kfac" in registry.names()
    assert "some-dist/kfac" in registry.names()
    assert "curvalg/kfac" not in registry.names()
    assert registry.build("some-dist/kfac") == registry.build("fresh")
    assert registry.build("curvalg/kfac") == own
    assert str(registry.build("kfac")) == "kfac"
    with pytest.raises(RegistryError, match="replace=True"):
        registry.register("kfac", lambda: own)
