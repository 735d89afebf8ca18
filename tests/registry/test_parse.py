"""parse(str(e)) == e, exact numbers, and messages that point at the fault."""

from __future__ import annotations

import contextlib
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings

from curvalg import parse
from curvalg.errors import ExpressionError, RegistryError
from curvalg.expr import (
    GGN,
    Block,
    Diagonal,
    Eigenbasis,
    Expr,
    Hessian,
    Identity,
    Jacobian,
    Kronecker,
    LowRank,
    MonteCarloGGN,
    Space,
    Zero,
    ZeroExpr,
    block_diagonal,
    diagonal_part,
    inv_sqrt,
    inverse,
    nystrom,
    restrict,
    sqrt,
)
from tests.support.strategies import O, P, expressions

Names = tuple[str, ...] | None


@settings(max_examples=200, deadline=None)
@given(expressions((P, P)))
def test_what_is_printed_is_read_back(expr: Expr) -> None:
    back = parse(str(expr))
    assert back == expr
    assert hash(back) == hash(expr)
    assert str(back) == str(expr)


@settings(max_examples=50, deadline=None)
@given(expressions((O, P), params=("head.*",)))
def test_restricted_jacobians_are_read_back(expr: Expr) -> None:
    assert parse(str(expr)) == expr


@settings(max_examples=50, deadline=None)
@given(expressions((P, O)))
def test_maps_from_outputs_are_read_back(expr: Expr) -> None:
    assert parse(str(expr)) == expr


G, H, SHIFTED = GGN(), Hessian(), Hessian() + Identity


@pytest.mark.parametrize(
    "expr",
    [
        2 * (SHIFTED @ G),
        -(SHIFTED @ G) + H,
        H - SHIFTED @ G / 3,
        G @ SHIFTED @ (2 * G + H),
        (2 * G).T @ (-H).T,
        inverse(2 * Identity) @ G,
        (G - G + 2 * Identity) @ H,
        2 * ((G - G + 2 * Identity) @ H),
        G - G + inverse(2 * Identity),
        (SHIFTED @ G) ** 2,
    ],
    ids=str,
)
def test_numbers_stay_where_they_belong(expr: Expr) -> None:
    assert parse(str(expr)) == expr


@pytest.mark.parametrize("codomain", [P, O])
@pytest.mark.parametrize("domain", [P, O])
@pytest.mark.parametrize("rows", [None, ("a",), ("a", "b")])
@pytest.mark.parametrize("columns", [None, ("a",), ("it's", "b")])
def test_every_zero_is_read_back(codomain: Space, domain: Space, rows: Names, columns: Names) -> None:
    zero = ZeroExpr(codomain, domain, rows if codomain == P else None, columns if domain == P else None)
    assert parse(str(zero)) == zero
    assert parse(str(zero.T)) == zero.T
    product = (
        ZeroExpr(codomain, P, zero.codomain_params) @ (GGN() - GGN()) @ ZeroExpr(P, domain, None, zero.domain_params)
    )
    assert product == zero


LEAVES = {
    "D": Diagonal(np.ones(3)),
    "Kronecker<2 x 3, float64>": Kronecker(np.eye(2), np.eye(3)),
    "LowRank<5, rank 2, float64>": LowRank(np.ones((5, 2))),
    "Eigenbasis<3, float64>": Eigenbasis(np.eye(3), np.ones(3)),
}


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_are_read_back_from_the_mapping(name: str) -> None:
    leaf = LEAVES[name]
    expr = inverse(2 * leaf + 0.5 * Identity) @ leaf.T + leaf @ leaf
    assert parse(str(expr), leaves={str(leaf): leaf}) == expr
    assert parse(f"2*{name} + ggn", leaves=LEAVES) == 2 * leaf + GGN()


def test_leaf_text_inside_a_string_stays_a_string() -> None:
    leaf = LEAVES["Eigenbasis<3, float64>"]
    expr = restrict(GGN() @ leaf, "Eigenbasis<3, float64>")
    assert parse(str(expr), leaves=LEAVES) == expr


def test_two_leaves_that_share_a_prefix() -> None:
    a, b = Diagonal(np.ones(3)), Diagonal(np.ones(33))
    expr = a + 2 * b
    assert parse(str(expr), leaves={str(a): a, str(b): b}) == expr


def test_a_leaf_comes_before_the_registry() -> None:
    leaf = Diagonal(np.ones(2))
    assert parse("ggn", leaves={"ggn": leaf}) == leaf


@pytest.mark.parametrize("name", ["a b", "identity", "inverse", "", "3", "'x'", 3])
def test_leaf_names_are_checked(name: str) -> None:
    with pytest.raises(ExpressionError, match="leaves: expected a name"):
        parse("ggn", leaves={name: GGN()})


def test_leaves_must_be_expressions() -> None:
    with pytest.raises(ExpressionError, match="got ndarray"):
        parse("D", leaves={"D": np.ones(3)})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1/3*ggn", GGN() / 3),
        ("ggn / 3", GGN() * Fraction(1, 3)),
        ("0.1*ggn + 0.2*ggn", 0.3 * GGN()),
        ("1e-3 * identity + ggn", GGN() + 0.001 * Identity),
        ("123456789012345678901234567890*ggn", 123456789012345678901234567890 * GGN()),
        ("(1 + 2)*3/4*ggn", GGN() * Fraction(9, 4)),
        ("2**-3*ggn", GGN() / 8),
        ("-ggn + +hessian", Hessian() - GGN()),
        ("-(ggn - hessian)", Hessian() - GGN()),
        ("ggn ** 2", GGN() @ GGN()),
        ("ggn ** -1", inverse(GGN())),
        ("ggn ** 0", GGN() ** 0),
        ("ggn ** (4/2)", GGN() ** 2),
        ("2 * ggn @ hessian", 2 * (GGN() @ Hessian())),
        ("jacobian.T.T", Jacobian()),
        ("Identity", Identity),
        ("Zero + zero", Zero),
        ("zero('outputs', 'parameters')", Jacobian() - Jacobian()),
        ("zero('parameters', 'parameters', domain_params='a')", ZeroExpr(P, P, None, ("a",))),
        ("zero('parameters', 'outputs', codomain_params=['a', 'b', 'a'])", ZeroExpr(P, O, ("a", "b"))),
        ("restrict(zero('outputs', 'parameters'), 'a')", restrict(Jacobian(), "a") - restrict(Jacobian(), "a")),
        ("restrict(zero, 'a')", ZeroExpr("parameters", "parameters", ("a",), ("a",))),
        ("ggn_mc(samples=3)", MonteCarloGGN(samples=3)),
        ("ggn_mc()", MonteCarloGGN()),
        ("term('curvalg/ggn_mc', seed=3)", MonteCarloGGN(seed=3)),
        ("block_diagonal(ggn, by=[['a', 'b'], ['c']])", block_diagonal(GGN(), by=(("a", "b"), ("c",)))),
        ("sqrt(ggn + 0.1*identity)", sqrt(GGN() + 0.1 * Identity)),
        ("inv_sqrt(ggn)", inverse(sqrt(GGN()))),
        ("inverse(sqrt(ggn), solver='blocks')", inverse(sqrt(GGN()), solver="blocks")),
        ("diagonal_part(2*ggn)", diagonal_part(2 * GGN())),
        ("nystrom(ggn + identity, 3)", nystrom(GGN(), 3) + Identity),
        ("nystrom(ggn, 3, seed=4)", nystrom(GGN(), 3, seed=4)),
        ("nystrom(ggn, rank=3)", nystrom(GGN(), rank=3)),
        ("nystrom(seed=4, rank=3, expr=ggn)", nystrom(seed=4, rank=3, expr=GGN())),
        ("inverse(expr=ggn, rtol=0.1)", inverse(expr=GGN(), rtol=0.1)),
        ("sqrt(expr=ggn)", sqrt(expr=GGN())),
        ("inv_sqrt(expr=ggn)", inv_sqrt(expr=GGN())),
        ("diagonal_part(probes=3, expr=ggn)", diagonal_part(probes=3, expr=GGN())),
        ("restrict(ggn, params=['a', 'b'])", restrict(GGN(), params=["a", "b"])),
        ("block_diagonal(what=ggn, by='module')", block_diagonal(what=GGN(), by="module")),
        (
            "block_diagonal([block(params='a', expr=ggn), block('b', expr=ggn, joint=True)])",
            block_diagonal([Block(("a",), GGN()), Block(("b",), GGN(), joint=True)]),
        ),
        ("zero(codomain='outputs', domain='parameters')", ZeroExpr(codomain="outputs", domain="parameters")),
        ("term(name='ggn')", GGN()),
        ("  restrict(ggn,\n  ('a', 'b'))  ", restrict(GGN(), ["a", "b"])),
        ("inverse(ggn, preconditioner=ggn + identity)", inverse(GGN(), preconditioner=GGN() + Identity)),
    ],
)
def test_syntax(text: str, expected: Expr) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", 0, "an expression is made of"),
        ("ggn +", 5, "cannot be read"),
        ("ggn + )", 6, "cannot be read"),
        ("2", 0, "a number alone is no operator"),
        ("ggn + 1e-3", 6, r"write 0\.001\*identity"),
        ("1 - ggn", 0, r"write 1\*identity"),
        ("ggn*hessian", 4, r"write \(ggn\) @ \(hessian\)"),
        ("2 / ggn", 0, r"write c \* inverse\(A\)"),
        ("ggn / hessian", 6, "divides by a number"),
        ("ggn / 0", 6, "by zero"),
        ("1/0 * ggn", 2, "division by zero"),
        ("0**-1 * ggn", 3, "negative powers"),
        ("2 @ ggn", 0, "joins two operators"),
        ("2 @ 3 * ggn", 4, "no operation on numbers"),
        ("5 % 3 * ggn", 4, "no operation on numbers"),
        ("ggn // hessian", 7, "no operation on operators"),
        ("ggn ** hessian", 7, r"an operator \*\* an integer"),
        ("2 ** ggn", 5, r"an operator \*\* an integer"),
        ("ggn ** 0.5", 7, r"an operator \*\* an integer"),
        ("ggn ** 100000", 7, "at most 1000"),
        ("10 ** 10 ** 10 * ggn", 6, "bits"),
        ("1e999 * ggn", 0, "finite"),
        ("2j * ggn", 0, "real number"),
        ("True * ggn", 0, "real number"),
        ("'ggn'", 0, "real number"),
        ("ggn @ jacobian", 6, "cannot multiply"),
        ("ggn + jacobian", 6, "cannot add"),
        ("ggn.lower", 4, r"expected \.T"),
        ("2.0.T * ggn", 0, "no transpose"),
        ("().__class__", 3, r"expected \.T"),
        ("ggn.lower(3)", 0, "only a name can be called"),
        ("ggn(3)", 4, "options are given by name"),
        ("ggn_mc(*[3])", 7, "options are given by name"),
        ("ggn_mc(**{'seed': 1})", 7, "unexpected"),
        ("ggn_mc(seed=1, seed=2)", 15, "each option once"),
        ("ggn_mc(seed=1 + 1)", 12, "literal"),
        ("ggn_mc(seed=2j)", 12, "expected a string, number"),
        ("ggn_mc(samples=0)", 0, "positive integer"),
        ("identity()", 0, "takes no options"),
        ("inverse", 0, "word of the syntax"),
        ("2*sqrt", 2, "word of the syntax"),
        ("inverse(ggn, hessian)", 13, "expected inverse"),
        ("inverse(jacobian)", 0, "square"),
        ("inverse(ggn, tol=1)", 13, "its options are solver"),
        ("inverse(ggn, solver='lu')", 0, "unknown solver"),
        ("sqrt(ggn, hessian)", 10, "expected sqrt"),
        ("sqrt(jacobian)", 0, "square root"),
        ("ggn + inv_sqrt(zero)", 6, "zero operator"),
        ("inv_sqrt(ggn, rtol=1)", 14, "unexpected 'rtol'"),
        ("diagonal_part()", 0, "expected diagonal_part"),
        ("diagonal_part(jacobian)", 0, "operator on parameters"),
        ("nystrom(ggn)", 0, "expected nystrom"),
        ("nystrom(ggn, 0)", 0, "rank must be"),
        ("nystrom(ggn, hessian)", 0, "rank must be"),
        ("nystrom(ggn, 3, rank=3)", 16, "'rank' is given twice"),
        ("nystrom(ggn, expr=hessian)", 13, "'expr' is given twice"),
        ("nystrom(rank=3)", 0, "expected nystrom"),
        ("nystrom(ggn, ranks=3)", 0, "expected nystrom"),
        ("nystrom(ggn, rank=3, ranks=3)", 21, "its options are seed"),
        ("nystrom(ggn, rank=3, rank=3)", 21, "'rank' is given twice"),
        ("restrict(ggn)", 0, "expected restrict"),
        ("restrict(ggn, 3)", 14, "parameter names"),
        ("restrict(ggn, 'a', by=3)", 19, "unexpected 'by'"),
        ("zero('parameters')", 0, "codomain"),
        ("zero('a', 'b')", 0, "codomain"),
        ("zero('outputs', 'parameters', rows='a')", 30, "its options are codomain_params, domain_params"),
        ("block_diagonal([ggn])", 16, "expected block"),
        ("block_diagonal([block('a', ggn, joint=3)])", 16, "True or False"),
        ("block_diagonal({'a': ggn, 'a': ggn})", 26, "once"),
        ("block_diagonal({**ggn})", 18, "once"),
        ("block_diagonal({'a': 3})", 21, "number alone"),
        ("block_diagonal([])", 0, "takes an expression"),
        ("[e for e in ggn]", 0, "not part of an expression"),
        ("ggn if hessian else fisher", 0, "not part of an expression"),
        ("lambda: ggn", 0, "not part of an expression"),
        ("ggn < hessian", 0, "not part of an expression"),
        ("(ggn := hessian)", 1, "not part of an expression"),
        ("ggn[0]", 0, "not part of an expression"),
        ("f'{ggn}'", 0, "not part of an expression"),
        ("ggn; hessian", 3, "cannot be read"),
        ("import os", 0, "cannot be read"),
        ("hessian + Diagonal<3, float64>", 10, "leaves="),
    ],
)
def test_faults_are_pointed_at(text: str, place: int, message: str) -> None:
    with pytest.raises(ExpressionError, match=message) as caught:
        parse(text)
    *_, quoted, caret = str(caught.value).split("\n")
    assert quoted == f"  {text}"
    assert caret == " " * (place + 2) + "^"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero('outputs', 'parameters', codomain_params='a')", "codomain of this zero is outputs"),
        ("zero('parameters', 'parameters', domain_params=3)", "parameter names"),
    ],
)
def test_parameters_of_a_zero_are_checked(text: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message) as caught:
        parse(f"ggn + {text}")
    assert str(caught.value).endswith("\n" + " " * 8 + "^")


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("ggn + hesian", 6, "did you mean 'hessian'"),
        ("ünknown @ Ggn", 0, r"did you mean '\w+' or '\w+' or '\w+'\?"),
        ("ggn + ggn_mc(sample=3)", 6, r"did you mean 'samples'\?.*ggn_mc\(samples: int = 1, seed: int = 0\)"),
        ("ggn_mc(seed='a')", 0, "must be int"),
        ("term('no/such')", 5, "no term is called 'no/such'"),
        ("__import__(name='os')", 0, "no term is called '__import__'"),
    ],
)
def test_unknown_names_and_options_are_pointed_at(text: str, place: int, message: str) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        parse(text)
    assert str(caught.value).endswith(f"\n  {text}\n{' ' * (place + 2)}^")


def test_the_caret_counts_characters_and_lines() -> None:
    with pytest.raises(RegistryError) as caught:
        parse("ggn_mc(seed=1) @ (ggn +\n ggn @ nix)")
    assert str(caught.value).endswith("   ggn @ nix)\n" + " " * 9 + "^")
    with pytest.raises(RegistryError) as caught:
        parse("restrict(ggn, 'üü') + nix")
    assert str(caught.value).endswith("\n" + " " * 24 + "^")
    with pytest.raises(RegistryError) as caught:
        parse("Eigenbasis<3, float64> + nix", leaves=LEAVES)
    assert str(caught.value).endswith("\n  Eigenbasis<3, float64> + nix\n" + " " * 27 + "^")


def test_long_lines_are_cut_around_the_fault() -> None:
    with pytest.raises(RegistryError) as caught:
        parse(" + ".join(["ggn"] * 300) + " + nix + " + " + ".join(["ggn"] * 300))
    *_, quoted, caret = str(caught.value).split("\n")
    assert len(quoted) < 130
    assert quoted[caret.index("^") :].startswith("nix")


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000 + "ggn" + ")" * 100_000,
        "-" * 100_000 + "ggn",
        "ggn" + ".T" * 100_000,
        "inverse(" * 150 + "ggn" + ")" * 150,
        "ggn_mc(seed=" + "[" * 190 + "]" * 190 + ")",
        "ggn_mc(seed=" + "-" * 5000 + "1)",
    ],
    ids=["parentheses", "signs", "transposes", "calls", "lists", "option"],
)
def test_absurd_depth_is_refused(text: str) -> None:
    with pytest.raises((ExpressionError, RegistryError)):
        parse(text)


def test_long_sums_are_not_deep() -> None:
    assert parse(" + ".join(["ggn"] * 800)) == 800 * GGN()
    try:
        assert parse(" + ".join(["ggn"] * 100_000)) == 100_000 * GGN()
    except ExpressionError as error:  # some versions of Python cannot build the syntax tree
        assert "nests too deeply" in str(error)


def test_only_strings_are_read() -> None:
    with pytest.raises(ExpressionError, match="as a string, got GGN"):
        parse(GGN())  # type: ignore[arg-type]
    with pytest.raises(ExpressionError, match="null bytes"):
        parse("ggn\0")


@pytest.mark.parametrize(
    "text", ["1is ggn", "0x1for", "2if ggn", "1.or 2", "ggn + 0b1in", "restrict(ggn, 'a\\.b')", "restrict(ggn, '\\8')"]
)
def test_python_does_not_warn_of_texts(text: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(ExpressionError):
            parse(text)
    assert not caught
