"""Every check finds the bug that was planted for it, and says what to do."""

from __future__ import annotations

import re

import pytest

from curvalg import registry
from curvalg.testing import CHECKS
from curvalg.testing.conformance import run
from curvalg.testing.subject import Subject
from tests.support.planted import PLANTED, REGISTERED, Twice

_IDS = [f"{check}: {type(term).__name__}" for check, term, _ in PLANTED]


def _fails(check, subject, says):
    message = run(check, subject)
    assert message is not None, f"{check} does not find it"
    assert re.search(says, message, re.DOTALL), message
    assert "expected" in message
    assert "got" in message


@pytest.mark.parametrize(("check", "term", "says"), PLANTED, ids=_IDS)
def test_a_planted_bug_is_found(check, term, says):
    _fails(check, Subject(term), says)


@pytest.mark.parametrize(("check", "factory", "says"), REGISTERED, ids=[check for check, _, _ in REGISTERED])
def test_a_planted_bug_of_a_registered_term_is_found(check, factory, says):
    with registry.scoped():
        registry.register("planted_term", factory)
        _fails(check, Subject("planted_term"), says)


def _ggn(problem):
    return registry.build("ggn").lower(problem).to_dense()


def test_a_matrix_unlike_the_reference_is_found():
    _fails("dense", Subject(Twice(), reference=_ggn), "relative difference of 1.0e.00")
    assert run("dense", Subject("ggn", reference=_ggn)) is None


def test_every_check_has_a_planted_bug():
    assert {check for check, *_ in [*PLANTED, *REGISTERED]} | {"dense"} == set(CHECKS)


def test_every_check_says_what_it_is_about():
    assert all((check.__doc__ or "").strip() for check in CHECKS.values())
