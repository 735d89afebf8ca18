"""Registering in the running program: names, replacing, scopes, labels."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import pytest

from curvalg import parse
from curvalg import registry as module
from curvalg.errors import RegistryError
from curvalg.expr import ALIASES, BUILTIN, GGN, Covariance, Expr, Hessian, MonteCarloGGN, Term
from curvalg.registry import Registry
from tests.support.fake_plugins import TERM, Install


@dataclass(frozen=True)
class Mine(Term):
    """What it is.

    And more.
    """

    k: int = 3


def test_a_class_and_a_decorated_class(registry: Registry) -> None:
    assert registry.register("mine", Mine) is Mine

    @registry.register("own")
    @dataclass(frozen=True)
    class Own(Term):
        pass

    assert str(registry.build("mine", k=4)) == "mine(k=4)"
    assert registry.build("own") == Own()
    assert {"mine", "own"} <= set(registry.names())
    spec = registry.spec("mine")
    assert (spec.origin, spec.distribution, spec.version, spec.summary) == ("registered", None, None, "What it is.")
    assert spec.qualified_name == spec.name == "mine"
    assert registry.spec("own").summary == ""  # not the signature that dataclass writes
    assert "this program" in registry.describe("mine")


def test_decorators_in_the_wrong_order(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="below @register"):

        @dataclass(frozen=True)
        @registry.register("own")
        class Own(Term):
            pass


@pytest.mark.parametrize("name", ["my-term", "3d", "", "a b", "lambda", "None", "dist/term", 3, None])
def test_invalid_names(registry: Registry, name: Any) -> None:
    with pytest.raises(RegistryError, match="Python identifier"):
        registry.register(name, Mine)


@pytest.mark.parametrize("name", ["identity", "Zero", "inverse", "block", "term", "inf"])
def test_words_of_the_syntax(registry: Registry, name: str) -> None:
    with pytest.raises(RegistryError, match="word of the expression syntax"):
        registry.register(name, Mine, replace=True)


@pytest.mark.parametrize("name", ["ggn", "empirical_fisher", "mine", "plugin_term"])
def test_existing_names_need_replace(registry: Registry, install: Install, name: str) -> None:
    install("some-dist", {"plugin_term": "plugin_some:MyTerm"}, {"plugin_some": TERM})
    registry.register("mine", GGN)
    with pytest.raises(RegistryError, match="replace=True"):
        registry.register(name, Mine)
    registry.register(name, Mine, replace=True)
    built = registry.build(name, k=5)
    assert built == Mine(5)
    assert str(built) == f"{name}(k=5)"
    assert parse(str(built), registry=registry) == built
    if name == "plugin_term":
        assert "some-dist/plugin_term" in registry.names()


def test_a_replaced_builtin_keeps_its_qualified_name(registry: Registry) -> None:
    assert str(registry.build("curvalg/ggn")) == "ggn"
    registry.register("ggn", Mine, replace=True)
    assert registry.build("ggn") == Mine()
    assert registry.build("curvalg/ggn") == GGN()
    assert str(registry.build("curvalg/ggn")) == "term('curvalg/ggn')"
    registry.register("covariance", Mine, replace=True)
    assert registry.build("empirical_fisher") == Mine()  # another name of whatever covariance is


def test_a_scope_undoes_and_restores(registry: Registry) -> None:
    registry.register("kept", GGN)
    with contextlib.suppress(ZeroDivisionError), registry.scoped() as inner:
        assert inner is registry
        registry.register("mine", Mine)
        registry.register("kept", Hessian, replace=True)
        registry.register("ggn", Mine, replace=True)
        with registry.scoped():
            registry.register("deeper", Mine)
        assert "deeper" not in registry.names()
        assert "mine" in registry.names()
        raise ZeroDivisionError
    assert "mine" not in registry.names()
    assert registry.build("kept") == GGN()
    assert registry.build("ggn") == GGN()


def test_registries_are_apart(registry: Registry) -> None:
    registry.register("mine", Mine)
    assert "mine" not in Registry().names()
    assert "mine" not in module.names()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda **options: GGN(), r"takes \*\*options"),
        (lambda *values: GGN(), r"takes \*values"),
        (GGN(), "wrap a ready expression"),
        ("ggn", "got str"),
        (Term, "frozen dataclass"),
    ],
)
def test_what_is_no_factory(registry: Registry, factory: Any, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        registry.register("mine", factory)
    assert "mine" not in registry.names()


def test_a_function_must_return_an_expression(registry: Registry) -> None:
    registry.register("mine", lambda: "ggn")  # type: ignore[arg-type,return-value]
    with pytest.raises(RegistryError, match="returned str, not an expression"):
        registry.build("mine")


def test_a_shared_instance_is_not_renamed(registry: Registry) -> None:
    shared = Mine()
    registry.register("first", lambda: shared)
    registry.register("second", lambda: shared)
    assert str(registry.build("first")) == "first"
    assert str(registry.build("second")) == "second"
    assert str(shared) == "mine"


def test_a_function_lends_its_name_only_if_that_reads_back(registry: Registry) -> None:
    @registry.register("four")
    def four(samples: int = 4) -> Expr:
        return MonteCarloGGN(samples)

    @registry.register("hidden")
    def hidden() -> Expr:
        return MonteCarloGGN(7)

    for built in (
        four(),
        registry.build("four", samples=2),
        registry.build("four", samples=1),
        registry.build("hidden"),
    ):
        assert parse(str(built), registry=registry) == built
    assert str(registry.build("four", samples=2)) == "four(samples=2)"
    assert str(registry.build("hidden")) == "ggn_mc(samples=7)"


@pytest.mark.parametrize("name", [*BUILTIN, *ALIASES])
def test_builtins(registry: Registry, name: str) -> None:
    canonical = ALIASES.get(name, name)
    built = registry.build(name)
    assert type(built) is BUILTIN[canonical]
    assert str(built) == canonical
    assert parse(str(built)) == built
    spec = registry.spec(name)
    assert (spec.name, spec.qualified_name, spec.origin) == (canonical, f"curvalg/{canonical}", "built-in")
    assert spec.summary
    assert registry.build(spec.qualified_name) == built
    assert str(registry.build(spec.qualified_name)) == canonical


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hesian", r"'hesian' \(did you mean 'hessian'"),
        ("HESSIAN", "did you mean 'hessian'"),
        ("zzzzzz", r"'zzzzzz' \(did you mean '\w+' or '\w+' or '\w+'\?\); registry.names\(\)"),
        ("curvalg/zzz", "no term is called 'curvalg/zzz'"),
        ("inverse", "no term is called"),
        ("", "no term is called ''"),
        (3, "name as a string, got int"),
    ],
)
def test_unknown_names(registry: Registry, name: Any, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        registry.build(name)


def test_a_misspelt_qualified_name(registry: Registry, install: Install) -> None:
    install("some-dist", {"plugin_term": "plugin_some:MyTerm"}, {"plugin_some": TERM})
    with pytest.raises(RegistryError, match="did you mean 'some-dist/plugin_term'"):
        registry.build("some-dist/plugin_trem")


def test_the_module_is_a_default_registry() -> None:
    assert module.build("empirical_fisher") == Covariance()
    with module.scoped():
        module.register("only_here", Mine)
        assert module.spec("only_here").factory is Mine
        assert parse("only_here(k=4)") == Mine(4)
    assert "only_here" not in module.names()


def test_an_option_may_be_called_name(registry: Registry) -> None:
    registry.register("mine", lambda name="ggn": registry.build(name))
    assert registry.build("mine", name="hessian") == Hessian()
