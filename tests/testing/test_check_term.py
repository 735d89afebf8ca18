"""What check_term reports, refuses and leaves out."""

from __future__ import annotations

import pickle

import pytest
import torch

from curvalg import CurvalgError, Problem, ProblemError, RegistryError, registry
from curvalg.testing import CHECKS, ConformanceError, check_term, default_problems
from tests.support.planted import AssumesLoss, Magnitude, Squares, WrongShape

FEW = default_problems()[:1]


class Refusing(Squares):
    """Refuses every model."""

    def validate(self, loss):
        raise ProblemError("not this one")


def test_all_failures_in_one_report():
    with pytest.raises(AssertionError) as caught:
        check_term(Magnitude(), problems=FEW)
    error = caught.value
    assert isinstance(error, ConformanceError)
    assert isinstance(error, CurvalgError)
    assert {"linearity", "adjoint"} <= set(error.failures) < set(CHECKS)
    assert str(error).startswith(f"magnitude fails {len(error.failures)} of {len(CHECKS)} checks")
    assert all(message in str(error) for message in error.failures.values())


def test_checks_of_numbers_wait_for_products():
    with pytest.raises(ConformanceError, match="were left out, since 'products' failed") as caught:
        check_term(WrongShape(), problems=FEW)
    assert set(caught.value.failures) == {"products"}


def test_an_expected_failure_must_fail():
    with pytest.raises(ConformanceError) as caught:
        check_term(Squares(), problems=FEW, expected_failures={"linearity": "said so"})
    assert "expected to fail (said so)" in caught.value.failures["linearity"]
    check_term(AssumesLoss(), problems=FEW, expected_failures={"errors": "no loss is never met"})


def test_an_expected_failure_of_no_check():
    with pytest.raises(ConformanceError, match=r"'lineality' \(did you mean 'linearity'\?\)"):
        check_term(Squares(), expected_failures={"lineality": "?"})


def test_problems_that_a_term_refuses_are_left_out_but_not_all():
    with pytest.raises(ConformanceError, match=r"at least one problem.*not this one.*problems="):
        check_term(Refusing(), problems=FEW)
    model = default_problems()[0].model.module
    without_loss = Problem(model, None, torch.ones(4, next(model.parameters()).shape[1]).double())
    check_term("hessian", problems=[without_loss, *FEW])


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("no_such_term", RegistryError, "no term is called"),
        ("ggn +", CurvalgError, "cannot be read"),
        (Squares, ConformanceError, "not the class"),
        (3, ConformanceError, "got int"),
    ],
)
def test_what_is_no_term(given, error, says):
    with pytest.raises(error, match=says):
        check_term(given)


def test_a_name_that_belongs_to_another_class():
    class Hessian(Squares):
        """Called like a built-in."""

    with registry.scoped():
        assert Hessian().label == "hessian"
        with pytest.raises(ConformanceError) as caught:
            check_term(Hessian(), problems=FEW)
    assert "parsing" not in caught.value.failures  # of the built-in, not of this one
    assert "pickling" in caught.value.failures  # a class inside a function


def test_the_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(ConformanceError("message", {"linearity": "why"})))
    assert str(error) == "message"


def test_the_users_problems_are_left_as_they_are():
    problem = default_problems()[0]
    problem.cache = 12345
    check_term(Squares(), problems=[problem])
    assert problem.cache == 12345
    assert problem.columns == "auto"


def test_lists_of_terms_are_split_at_their_own_commas(inside):
    assert inside["names_of_terms"](" a, b(k=3, x=(1, 2)) ,term('p/q', n='a,b'),, 2*c ") == [
        "a",
        "b(k=3, x=(1, 2))",
        "term('p/q', n='a,b')",
        "2*c",
    ]


def test_default_problems_are_chosen_by_the_names_that_failures_print():
    (problem,) = default_problems("sequence, samples are positions")
    assert problem.samples == "position"
    with pytest.raises(ProblemError, match="no problem called 'gpt'; choose among 'classifier'"):
        default_problems("gpt")


def test_problems_are_a_list():
    for problems, got in ((FEW[0], "a Problem"), ([], "none")):
        with pytest.raises(ConformanceError, match=rf"expected problems=\[problem, ...\], got {got}"):
            check_term(Squares(), problems=problems)
