"""Facts of the built-in terms follow the facts of the loss."""

from __future__ import annotations

import pytest

from curvalg.expr import (
    BUILTIN,
    GGN,
    Block,
    Covariance,
    Expr,
    Facts,
    Fisher,
    Hessian,
    Identity,
    Jacobian,
    LossFacts,
    LossHessian,
    MonteCarloGGN,
    Residual,
    block_diagonal,
    inverse,
    restrict,
)

PSD, DEFINITE, SYMMETRIC = Facts(psd=True), Facts(positive_definite=True), Facts(symmetric=True)
CONVEX, CONCAVE = LossFacts("convex", convex=True), LossFacts("other", convex=False)


@pytest.mark.parametrize(
    ("term", "with_convex", "with_other"),
    [
        (Hessian(), SYMMETRIC, SYMMETRIC),
        (GGN(), PSD, SYMMETRIC),
        (Residual(), SYMMETRIC, SYMMETRIC),
        (Fisher(), PSD, PSD),
        (Covariance(), PSD, PSD),
        (MonteCarloGGN(), PSD, PSD),
        (LossHessian(), PSD, SYMMETRIC),
        (Jacobian().T @ LossHessian() @ Jacobian(), PSD, SYMMETRIC),
        (GGN() + Identity, DEFINITE, SYMMETRIC),
        (inverse(GGN() + Identity), DEFINITE, SYMMETRIC),
        (block_diagonal(GGN(), by="module"), PSD, SYMMETRIC),
        (block_diagonal([Block(("a",), GGN(), joint=True)]), PSD, SYMMETRIC),
        (restrict(GGN(), "a"), PSD, SYMMETRIC),
    ],
)
def test_facts_follow_the_loss(term: Expr, with_convex: Facts, with_other: Facts) -> None:
    assert term.facts(CONVEX) == with_convex
    assert term.facts(CONCAVE) == with_other
    assert term.facts() == with_other  # of a loss nothing is known of


def test_first_lines_of_docstrings_are_plain_text() -> None:
    for name, term in BUILTIN.items():
        first = (term.__doc__ or "").split("\n")[0]
        assert first.endswith("."), name
        assert not {"`", "*"} & set(first), name


def test_implications() -> None:
    assert Facts(positive_definite=True) == Facts(True, True, True)
    assert Facts(psd=True) == Facts(True, True, None)
    assert Facts(symmetric=False) == Facts(False, False, False)
    assert Facts(psd=False) == Facts(None, False, False)
