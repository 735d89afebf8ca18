"""Entries of the registry: where a term comes from, its options, and whether given options fit them."""

from __future__ import annotations

import difflib
import enum
import inspect
import keyword
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from curvalg.errors import RegistryError, TermOptionError
from curvalg.expr.node import Expr
from curvalg.expr.term import NamedExpr

SUPPORTED_API = 1
"""The version of the term contract (``NamedExpr.api``) that this curvalg speaks."""

REQUIRED: Any = inspect.Parameter.empty
"""Default of an option that must be given."""

RESERVED = frozenset(
    ("identity", "Identity", "zero", "Zero", "inverse", "block_diagonal", "block", "restrict", "term", "inf", "nan")
    + ("sqrt", "inv_sqrt", "diagonal_part", "nystrom")
)
"""Words of the expression syntax; no term can be called so."""

Factory = Callable[..., Expr]
"""A term class, or a function that returns an expression."""

Origin = Literal["built-in", "plugin", "registered"]


@dataclass(frozen=True)
class Option:
    """One option of a term, as registered.

    Args:
        name: its keyword.
        annotation: its type, as written; empty where none is.
        default: its default; ``REQUIRED`` where there is none.
        hint: the type itself; ``Any`` where it is not known.

    >>> print(Option("samples", "int", 1, int))
    samples: int = 1
    """

    name: str
    annotation: str = ""
    default: Any = REQUIRED
    hint: Any = field(default=Any, repr=False, compare=False)

    @property
    def required(self) -> bool:
        """Whether the option must be given."""
        return self.default is REQUIRED

    def __str__(self) -> str:
        typed = f"{self.name}: {self.annotation}" if self.annotation else self.name
        if self.required:
            return typed
        return f"{typed} = {self.default!r}" if self.annotation else f"{typed}={self.default!r}"


@dataclass(frozen=True)
class TermSpec:
    """A term as the registry knows it.

    Args:
        name: its short name.
        qualified_name: ``distribution/name``; the short name where no distribution brought it.
        distribution: the distribution that brought it; None for a registered one.
        version: that distribution's version.
        origin: "built-in", "plugin" or "registered".
        summary: first line of its docstring.
        options: what can be set.
        factory: the class or function that makes it.

    >>> from curvalg import registry
    >>> registry.spec("ggn_mc").signature
    'ggn_mc(samples: int = 1, seed: int = 0)'
    """

    name: str
    qualified_name: str
    distribution: str | None
    version: str | None
    origin: Origin
    summary: str
    options: tuple[Option, ...]
    factory: Factory = field(repr=False)

    @property
    def signature(self) -> str:
        """The name with every option, its type and its default."""
        return f"{self.name}({', '.join(map(str, self.options))})"

    def describe(self) -> str:
        """Name, options, summary and origin, a few lines to read."""
        source = f"{self.distribution} {self.version}" if self.distribution else "this program"
        lines = [self.signature, f"  {self.summary or '(no description)'}", f"  {self.origin}, from {source}"]
        if self.qualified_name != self.name:
            lines.append(f"  qualified name: {self.qualified_name}")
        return "\n".join(lines)


# -- reading a factory -------------------------------------------------------------------------------------------------


def summary_of(factory: Factory) -> str:
    """The first line of a docstring; empty where there is none."""
    text = inspect.getdoc(factory) or ""
    generated = isinstance(factory, type) and text.startswith(f"{factory.__name__}(")  # dataclass writes its signature
    return "" if generated else text.partition("\n")[0].strip()


def options_of(factory: object, who: str) -> tuple[Option, ...]:
    """The options that a term class or function takes.

    Args:
        factory: what a registration or an entry point gave.
        who: how messages call it.

    Raises:
        RegistryError: not a factory, written for another contract, or its options cannot be found.
    """
    if isinstance(factory, type) and issubclass(factory, NamedExpr):
        _check_class(factory, who)
    elif isinstance(factory, Expr) or not callable(factory):
        raise TermOptionError(
            f"{who}: expected a term class or a function that returns an expression, got {type(factory).__name__}; "
            "wrap a ready expression in a function without arguments"
        )
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError) as error:
        raise RegistryError(f"{who}: its options cannot be read ({error}); wrap it in a Python function") from error
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            raise RegistryError(
                f"{who}: takes {parameter}, so a misspelt option could not be refused and nothing could be printed; "
                "name each option with its default"
            )
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise RegistryError(f"{who}: option {parameter.name!r} is positional-only; options are given by name")
    return tuple(_option(factory, parameter) for parameter in parameters)


def _check_class(cls: type[NamedExpr], who: str) -> None:
    if cls.api != SUPPORTED_API:
        newer = isinstance(cls.api, int) and cls.api > SUPPORTED_API
        cure = "upgrade curvalg" if newer else "upgrade the package that brings the term"
        raise RegistryError(f"{who}: written for term api {cls.api}, this curvalg speaks api {SUPPORTED_API}; {cure}")
    # In the class's own namespace: a subclass that forgot the decorator would inherit its base's options.
    params = cls.__dict__.get("__dataclass_params__")
    if params is None or not params.frozen or not params.eq or cls.__hash__ is None:
        raise RegistryError(
            f"{who}: {cls.__name__} is not a frozen dataclass, so its instances are not hashable and comparable by "
            "their options; decorate the class with @dataclass(frozen=True) (below @register, where that is used)"
        )


def _option(factory: Any, parameter: inspect.Parameter) -> Option:
    written = parameter.annotation
    if written is inspect.Parameter.empty:
        return Option(parameter.name, "", parameter.default)
    hint = _hint(factory, parameter.name, written)
    if typing.get_origin(hint) is Literal:  # the choices, not the name that they have in the source
        text = f"Literal[{', '.join(map(repr, typing.get_args(hint)))}]"
    else:
        text = written if isinstance(written, str) else inspect.formatannotation(written)
    return Option(parameter.name, text, parameter.default, hint)


def _hint(factory: Any, name: str, written: Any) -> Any:
    if isinstance(factory, type):
        owner = next((c for c in factory.__mro__ if name in inspect.get_annotations(c)), factory)
        namespace = vars(sys.modules[owner.__module__]) if owner.__module__ in sys.modules else {}
    else:
        namespace = getattr(inspect.unwrap(getattr(factory, "func", factory)), "__globals__", {})
    try:
        # One at a time: an annotation that only a type checker can resolve must not hide the others.
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={name: written}), globalns=namespace)[name]
    except Exception:  # evaluating an annotation may raise anything; what is not known is not checked
        return Any


def refused_name(name: object) -> str | None:
    if isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name):
        return None
    return f"a term's name must be a Python identifier and no keyword, such as 'my_term'; got {name!r}"


# -- checking options --------------------------------------------------------------------------------------------------


def checked_options(spec: TermSpec, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the factory takes them.

    Raises:
        RegistryError: an unknown, missing or ill-typed option; the message gives the signature.
    """
    known = {option.name: option for option in spec.options}
    shown = f"the signature is {spec.signature}"
    for name in options:
        if name not in known:
            raise TermOptionError(f"{spec.name} has no option {name!r}{did_you_mean(name, known)}; {shown}")
    missing = [name for name, option in known.items() if option.required and name not in options]
    if missing:
        raise TermOptionError(f"{spec.name} needs {', '.join(map(repr, missing))}; {shown}")
    plain = {name: _plain(value) for name, value in options.items()}
    for name, value in plain.items():
        if not fits(value, known[name].hint):
            raise TermOptionError(
                f"{spec.name}: option {name!r} must be {known[name].annotation}, got {value!r} "
                f"({type(value).__name__}); {shown}"
            )
    return plain


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A hint ``" (did you mean 'a' or 'b'?)"`` with the nearest three, or nothing where none is as close as ``cutoff`` of 1."""
    folded = {candidate.casefold(): candidate for candidate in known}
    close = [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, 3, cutoff)]
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _plain(value: Any) -> Any:
    # np.float64 is a float and np.str_ a str, but neither prints as a literal that can be read back.
    for kind in (float, str):
        if isinstance(value, kind) and type(value) is not kind and not isinstance(value, enum.Enum):
            return kind(value)
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; types that are not understood fit everything.

    >>> fits(3, float), fits(True, int), fits((1, 2), tuple[int, ...]), fits("a", int | None)
    (True, False, True, False)
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is typing.Annotated:
        return fits(value, args[0])
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, list, tuple):
        return isinstance(value, hint)
    if origin is list:
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and _fits_tuple(value, args)
    return True


def _fits_tuple(value: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
    if len(args) == 2 and args[1] is Ellipsis:
        return all(fits(item, args[0]) for item in value)
    return len(value) == len(args) and all(fits(item, arg) for item, arg in zip(value, args, strict=True))


def refused_result(spec: TermSpec, built: object) -> str | None:
    """The reason why what a factory returned is no expression the algebra can hold; None where it is one."""
    if not isinstance(built, Expr):
        return f"returned {type(built).__name__}, not an expression"
    try:
        hash(built)
    except TypeError as error:
        return f"cannot be hashed ({error}); give tuples instead of lists"
    return None
