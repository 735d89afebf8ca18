"""Printing: text, trees and LaTeX."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import given, settings

from curvalg import parse, registry
from curvalg.expr import (
    GGN,
    Block,
    Expr,
    Hessian,
    Identity,
    Jacobian,
    MonteCarloGGN,
    Term,
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
from tests.support.strategies import expressions

G, H, J = GGN(), Hessian(), Jacobian()
SHIFTED = H + Identity

TEXTS = {
    "ggn": G,
    "identity": Identity,
    "zero": Zero,
    "zero('outputs', 'parameters')": J - J,
    "restrict(zero('parameters', 'parameters'), 'a')": restrict(G, "a") - restrict(G, "a"),
    "restrict(zero('outputs', 'parameters'), ['a', 'b'])": ZeroExpr("outputs", "parameters", None, ("a", "b")),
    "restrict(zero('parameters', 'outputs'), 'a')": ZeroExpr("parameters", "outputs", ("a",)),
    "zero('parameters', 'parameters', codomain_params='a')": restrict(J, "a").T @ J - restrict(J, "a").T @ J,
    "zero('parameters', 'parameters', domain_params=['a', 'b'])": ZeroExpr(
        "parameters", "parameters", None, ("a", "b")
    ),
    "zero('parameters', 'parameters', codomain_params='a', domain_params='b')": ZeroExpr(
        "parameters", "parameters", ("a",), ("b",)
    ),
    "ggn / 3": G / 3,
    "2*ggn / 3": 2 * G / 3,
    "-ggn": -G,
    "-ggn / 3 + 0.001*identity": -G / 3 + 1e-3 * Identity,
    "ggn - hessian": G - H,
    "0.3*ggn": 0.1 * G + 0.2 * G,
    "1e-05*ggn": 1e-5 * G,
    "100000000000000000000000*ggn": 1e23 * G,
    "ggn + 0.5*identity": 0.5 * Identity + G,
    "zero('parameters', 'parameters') + 2*identity": G - G + 2 * Identity,
    "ggn @ hessian": G @ H,
    "2*ggn @ hessian": 2 * (G @ H),
    "ggn @ hessian / 3": G @ H / 3,
    "ggn @ (hessian + identity)": G @ SHIFTED,
    "(hessian + identity) @ ggn": SHIFTED @ G,
    "2*((hessian + identity) @ ggn)": 2 * (SHIFTED @ G),
    "-((hessian + identity) @ ggn)": -(SHIFTED @ G),
    "ggn - (hessian + identity) @ ggn": G - SHIFTED @ G,
    "ggn @ ggn": G**2,
    "jacobian.T": J.T,
    "(2*ggn).T": (2 * G).T,
    "(ggn @ hessian).T": (G @ H).T,
    "inverse(ggn)": inverse(G),
    "sqrt(ggn + 0.1*identity)": sqrt(G + 0.1 * Identity),
    "inv_sqrt(ggn)": inv_sqrt(G),
    "inverse(sqrt(ggn), rtol=0.1)": inverse(sqrt(G), rtol=0.1),
    "diagonal_part(ggn @ hessian)": diagonal_part(G @ H),
    "nystrom(ggn, 4)": nystrom(G, 4),
    "nystrom(2*ggn, 4, seed=3) + 0.5*identity": nystrom(2 * G + Identity / 2, 4, seed=3),
    "inverse(ggn, rtol=0.001, preconditioner=ggn + identity)": inverse(
        G,
        rtol=Fraction(1, 1000),
        preconditioner=G + Identity,  # type: ignore[arg-type]
    ),
    "block_diagonal(ggn)": block_diagonal(G),
    "block_diagonal(ggn, by='module')": block_diagonal(G, by="module"),
    "block_diagonal(ggn, by=(('a', 'b'), ('c',)))": block_diagonal(G, by=[["a", "b"], "c"]),
    "block_diagonal({'a': ggn, 'b': 2*hessian})": block_diagonal({"a": G, "b": 2 * H}),
    "block_diagonal([block(['a', 'b'], ggn, joint=True), block('c', ggn)])": block_diagonal(
        [Block(("a", "b"), G, joint=True), Block(("c",), G)]
    ),
    "block_diagonal([block('a', ggn), block('a', hessian)])": block_diagonal([Block(("a",), G), Block(("a",), H)]),
    "restrict(ggn, 'head.*')": restrict(G, "head.*"),
    "restrict(ggn, ['a', \"it's\"])": restrict(G, ["a", "it's"]),
    "ggn_mc(samples=3)": MonteCarloGGN(samples=3),
    "term('my-dist/ggn_mc', samples=3)": MonteCarloGGN(samples=3).labelled("my-dist/ggn_mc"),
    "term('my-dist/ggn')": GGN().labelled("my-dist/ggn"),
}


@pytest.mark.parametrize("shown", TEXTS)
def test_text(shown: str) -> None:
    assert str(TEXTS[shown]) == shown


def test_repr_is_readable() -> None:
    assert repr(2 * G @ H + Identity) == "2*ggn @ hessian + identity"
    assert repr(Block(("a",), G)) == "block('a', ggn)"


def test_only_what_can_be_given_is_printed() -> None:
    @dataclass(frozen=True)
    class Derived(Term):
        required: int
        sizes: tuple[int, ...] = field(default_factory=tuple)
        total: int = field(init=False, default=0)

        def __post_init__(self) -> None:
            object.__setattr__(self, "total", self.required + 1)

    assert str(Derived(3)) == "derived(required=3, sizes=())"


def test_labels_do_not_count() -> None:
    labelled = GGN().labelled("other/ggn")
    assert labelled == G
    assert hash(labelled) == hash(G)
    assert labelled + G == 2 * G


def test_class_names_become_term_names() -> None:
    class MyKFACTerm(Term):
        pass

    assert MyKFACTerm.name == "my_kfac_term"
    assert GGN.name == "ggn"


def test_tree() -> None:
    expr = inverse(G @ J.T @ J / 3 - 2 * Identity, solver="cg") @ block_diagonal({"a": H})
    assert expr.tree().split("\n") == [
        "product",
        "├─ inverse solver=cg",
        "│  └─ sum",
        "│     ├─ 1/3 * product",
        "│     │  ├─ ggn",
        "│     │  ├─ transpose",
        "│     │  │  └─ jacobian",
        "│     │  └─ jacobian",
        "│     └─ -2 * identity",
        "└─ block_diagonal",
        "   └─ 'a': hessian",
    ]


TREES = {
    "inverse\n└─ sqrt\n   └─ ggn": inv_sqrt(G),
    "diagonal_part\n└─ ggn": diagonal_part(G),
    "nystrom rank=4\n└─ ggn": nystrom(G, 4),
    "nystrom rank=4, seed=1\n└─ ggn": nystrom(G, 4, seed=1),
    "restrict '0.*'\n└─ ggn": restrict(G, "0.*"),
    "restrict ['a', 'b']\n└─ transpose\n   └─ jacobian": restrict(J.T, ["a", "b"]),
    "sum\n├─ ggn\n└─ identity": G + Identity,
    "sum\n├─ -ggn\n└─ -identity": -G - Identity,
    "sum\n└─ -ggn": -G,
    "sum\n└─ 2 * ggn": 2 * G,
    "sum\n├─ zero('parameters', 'parameters')\n└─ 2 * identity": G - G + 2 * Identity,
    "sum\n├─ -product\n│  ├─ ggn\n│  └─ hessian\n└─ ggn": -(G @ H) + G,
    "block_diagonal by=module\n└─ ggn": block_diagonal(G, by="module"),
    "block_diagonal\n└─ ggn": block_diagonal(G),
    "block_diagonal by=(('a', 'b'),)\n└─ ggn": block_diagonal(G, by=[["a", "b"]]),
    "block_diagonal\n├─ 'a': ggn\n└─ ['b', 'c'] joint: sum\n   └─ -hessian": block_diagonal(
        [Block(("a",), G), Block(("b", "c"), -H, joint=True)]
    ),
    "restrict(zero('outputs', 'parameters'), 'a')": restrict(J, "a") - restrict(J, "a"),
}


@pytest.mark.parametrize("shown", TREES)
def test_trees(shown: str) -> None:
    assert TREES[shown].tree() == shown


LATEX = {
    "I": Identity,
    "0": Zero,
    "G": G,
    r"\hat{G}_{\mathrm{samples=3}}": MonteCarloGGN(samples=3),
    r"\tfrac{1}{3}\,G + 10^{-5}\,I": G / 3 + 1e-5 * Identity,
    r"-G - 2.5 \cdot 10^{-7}\,H": -G - 2.5e-7 * H,
    r"0.5\,G": G / 2,
    r"G + 10^{-3}\,I": G + 1e-3 * Identity,
    r"2.5 \cdot 10^{-3}\,G": 0.0025 * G,
    r"-1.25 \cdot 10^{-3}\,G": -0.00125 * G,
    r"9.9 \cdot 10^{-3}\,G": 0.0099 * G,
    r"0.01\,G": G / 100,
    r"0.05\,G - 0.5\,H": 0.05 * G - H / 2,
    r"\tfrac{1}{300}\,G": G / 300,
    r"1000000\,G": 1e6 * G,
    r"2.5\,G": 2.5 * G,
    r"G\,\left(H + I\right)": G @ SHIFTED,
    r"J^\top": J.T,
    r"\left(G + I\right)^{-1}": inverse(G + Identity),
    r"\left(G + I\right)^{1/2}": sqrt(G + Identity),
    r"G^{-1/2}": inv_sqrt(G),
    r"\operatorname{diag}\left(G + H\right)": diagonal_part(G + H),
    r"\left(G + H\right)_{\mathrm{rank=4}}": nystrom(G + H, 4),
    r"G_{\mathrm{rank=4,\, seed=1}}": nystrom(G, 4, seed=1),
    r"\operatorname{blockdiag}\left(G\right)": block_diagonal(G),
    r"G\big|_{\mathrm{a\_b}}": restrict(G, "a_b"),
}


@pytest.mark.parametrize("shown", LATEX)
def test_latex(shown: str) -> None:
    assert LATEX[shown]._repr_latex_() == f"${shown}$"  # type: ignore[attr-defined]


@settings(max_examples=100, deadline=None)
@given(expressions())
def test_every_expression_has_all_three(expr: Expr) -> None:
    assert str(expr)
    assert "object at 0x" not in str(expr) + expr.tree() + expr._repr_latex_()
    latex = expr._repr_latex_()
    assert latex.count("{") == latex.count("}")
    assert latex.count(r"\left(") == latex.count(r"\right)")
    assert len(expr.tree().split("\n")) >= 1


def test_zero_of_one_kind_is_not_another() -> None:
    assert ZeroExpr("outputs", "parameters") == J - J != Zero


@pytest.mark.parametrize(
    ("coefficient", "shown", "latex"),
    [
        (1e-300, "1e-300*ggn", r"10^{-300}\,G"),
        (5e-324, "5e-324*ggn", r"5 \cdot 10^{-324}\,G"),
        (1.5e40, "1.5e+40*ggn", r"1.5 \cdot 10^{40}\,G"),
        (1e300, "1e+300*ggn", r"10^{300}\,G"),
        (10**15, "1000000000000000*ggn", r"1000000000000000\,G"),
    ],
)
def test_tiny_and_huge_coefficients_are_short(coefficient, shown, latex) -> None:
    expr = coefficient * registry.build("ggn")
    assert str(expr) == shown
    assert expr._repr_latex_() == f"${latex}$"
    assert parse(shown) == expr
