"""Every law holds numerically on its witnesses, fires on them, and rewriting ends in one form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from strategies import expressions

from curvalg import ExpressionError, Identity
from curvalg.rewrite import LAWS, Law, rewrite, simplify
from curvalg.rewrite.laws import A, B, S
from curvalg.rewrite.witness import DenseWorld

WORLD = DenseWorld({"a": (0, 1), "b": (2, 3, 4)}, outputs=4)
WITNESSES = [(law, w) for law in LAWS for w in law.witnesses()]


@pytest.mark.parametrize(("law", "witness"), WITNESSES, ids=[f"{law.name}: {w}" for law, w in WITNESSES])
def test_law_fires_and_holds(law, witness):
    result = rewrite(witness, [law], law.loss)
    assert [step.law for step in result.steps], "the law does not fire on its witness"
    if "fisher_mc" in str(witness):
        assert result.expr.samples == witness.samples
    np.testing.assert_allclose(WORLD.value(result.expr), WORLD.value(witness), rtol=1e-8, atol=1e-10)


def test_every_law_has_a_witness():
    assert all(list(law.witnesses()) for law in LAWS)
    assert len({law.name for law in LAWS}) == len(LAWS)


def test_a_wrong_law_is_caught():
    wrong = Law(
        "wrong", "(A @ B).T = A.T @ B.T", lambda e, _: A.T @ B.T if e == (A @ B).T else None, lambda: [(A @ B).T]
    )
    result = rewrite((A @ B).T, [wrong])
    assert not np.allclose(WORLD.value(result.expr), WORLD.value((A @ B).T))


def test_laws_that_undo_each_other_are_an_error():
    there = Law("there", "A = B", lambda e, _: B if e == A else None, list)
    back = Law("back", "B = A", lambda e, _: A if e == B else None, list)
    with pytest.raises((ExpressionError, RecursionError)):
        rewrite(A + Identity, [there, back])


@settings(max_examples=150, deadline=None)
@given(expressions())
def test_simplification_ends_and_is_idempotent(expr):
    once = simplify(expr).expr
    assert simplify(once).expr == once
    assert (once.domain, once.codomain) == (expr.domain, expr.codomain)


def test_nested_rewriting_reaches_the_bottom():
    assert simplify(((S @ A).T + 2 * (A @ B).T).T).expr == S @ A + 2 * (A @ B)
