"""Options are checked by name and type; messages give the signature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

import numpy as np
import pytest

from curvalg import parse
from curvalg.errors import RegistryError
from curvalg.expr import Expr, MonteCarloGGN, Term
from curvalg.registry import Registry
from tests.support.fake_plugins import Install

if TYPE_CHECKING:
    from nowhere import Unknowable


@dataclass(frozen=True)
class Sampled(Term):
    """A term with options of many types."""

    k: int
    scale: float = 1.0
    mode: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    odd: Unknowable | None = None
    name_of: str | None = None


@pytest.fixture
def sampled(registry: Registry) -> Registry:
    registry.register("sampled", Sampled)
    return registry


SIGNATURE = (
    "sampled(k: int, scale: float = 1.0, mode: Literal['a', 'b'] = 'a', sizes: tuple[int, ...] = (), "
    "odd: Unknowable | None = None, name_of: str | None = None)"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sampled needs 'k'"),
        ({"k": 1, "scales": 2.0}, r"no option 'scales' \(did you mean 'scale'\?\)"),
        ({"k": 1, "zzz": 2.0}, "no option 'zzz';"),
        ({"k": "1"}, r"option 'k' must be int, got '1' \(str\)"),
        ({"k": True}, r"option 'k' must be int, got True \(bool\)"),
        ({"k": 1.0}, r"option 'k' must be int, got 1\.0 \(float\)"),
        ({"k": 1, "scale": "x"}, "option 'scale' must be float"),
        ({"k": 1, "mode": "c"}, r"option 'mode' must be Literal\['a', 'b'\]"),
        ({"k": 1, "sizes": [1]}, r"option 'sizes' must be tuple\[int, ...\], got \[1\] \(list\)"),
        ({"k": 1, "sizes": (1, 2.0)}, "option 'sizes' must be"),
        ({"k": 1, "name_of": 3}, r"option 'name_of' must be str \| None"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_signature(
    sampled: Registry, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        sampled.build("sampled", **options)
    assert SIGNATURE in str(caught.value)


def test_what_fits_is_passed_on(sampled: Registry) -> None:
    options: dict[str, Any] = {"k": 1, "scale": 2, "mode": "b", "sizes": (1, 2), "odd": "anything", "name_of": "x"}
    built = sampled.build("sampled", **options)
    assert built == Sampled(**options)
    assert parse(str(built), registry=sampled) == built


def test_numpy_scalars_print_as_literals(sampled: Registry) -> None:
    built = sampled.build("sampled", k=1, scale=np.float64(0.5), name_of=np.str_("x"))
    assert str(built) == "sampled(k=1, scale=0.5, name_of='x')"


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), -2.5, 1e-300])
def test_any_float_is_read_back(sampled: Registry, value: float) -> None:
    built = sampled.build("sampled", k=-1, scale=value)
    assert parse(str(built), registry=sampled) == built


def test_types_of_a_base_class_are_found(registry: Registry) -> None:
    @dataclass(frozen=True)
    class Derived(MonteCarloGGN):
        extra: bool = False

    registry.register("derived", Derived)
    with pytest.raises(RegistryError, match="option 'samples' must be int"):
        registry.build("derived", samples="many")
    with pytest.raises(RegistryError, match="option 'extra' must be bool"):
        registry.build("derived", extra=1)
    assert registry.build("derived", samples=2, extra=True) == Derived(samples=2, extra=True)


def test_inherited_types_are_those_of_the_base_class_module(registry: Registry, install: Install) -> None:
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    base = "from curvalg import Term\nSize = int\n@dataclass(frozen=True)\nclass Base(Term):\n    size: Size = 1\n"
    derived = "from plugin_base import Base\nSize = str\n@dataclass(frozen=True)\nclass Derived(Base):\n    pass\n"
    install(
        "typed", {"typed": "plugin_derived:Derived"}, {"plugin_base": head + base, "plugin_derived": head + derived}
    )
    with pytest.raises(RegistryError, match="'size' must be Size"):
        registry.build("typed", size="1")
    assert str(registry.build("typed", size=2)) == "typed(size=2)"


def test_functions_have_options_too(registry: Registry) -> None:
    def scaled(factor: float, base="ggn") -> Expr:  # type: ignore[no-untyped-def]
        return factor * registry.build(base)

    registry.register("scaled", scaled)
    assert registry.spec("scaled").signature == "scaled(factor: float, base='ggn')"
    with pytest.raises(RegistryError, match="'factor' must be float"):
        registry.build("scaled", factor="2")
    assert registry.build("scaled", factor=2, base="hessian") == 2 * registry.build("hessian")


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [0, -3], [True, 1.0, "1", None]),
        (float, [0, 1.5, float("inf")], [True, "1", None]),
        (bool, [True], [1, None]),
        (str, [""], [b"", 1]),
        (None, [None], [0, False]),
        (Any, [1, None, "x"], []),
        (object, [1, None], []),
        (Optional[int], [1, None], [1.0, True]),  # noqa: UP045 - the old spelling is what is tested
        (Union[int, str], [1, "a"], [None]),  # noqa: UP007
        (int | str, [1, "a"], [None]),
        (Literal["a", 1, None], ["a", 1, None], ["b", True, 2]),
        (tuple, [(), (1, "a")], [[]]),
        (tuple[()], [()], [(1,)]),
        (tuple[int, ...], [(), (1, 2)], [[1], (1, "a"), 1]),
        (tuple[int, str], [(1, "a")], [(1,), (1, "a", 2), ("a", 1)]),
        (tuple[tuple[str, ...], ...], [(("a",), ())], [("a",)]),
        (list, [[1]], [(1,)]),
        (list[int], [[], [1]], [["a"], (1,)]),
        (Annotated[int, "positive"], [1], ["a"]),
        (dict[str, int], [{}, 3], []),
    ],
)
def test_types(hint: Any, good: list[Any], bad: list[Any], registry: Registry) -> None:
    def typed(value: Any) -> Expr:
        return registry.build("ggn")

    typed.__annotations__["value"] = hint
    registry.register("typed", typed)
    for value in good:
        assert registry.build("typed", value=value) == registry.build("ggn")
    for value in bad:
        with pytest.raises(RegistryError, match="'value' must be"):
            registry.build("typed", value=value)
