"""Terms that keep the contract pass: all built-in ones, first-party plugins, third-party ones of every kind, sums."""

from __future__ import annotations

import pytest
import torch

from curvalg import Diagonal, Identity, Problem, inverse, registry, restrict
from curvalg.expr import BUILTIN
from curvalg.testing import check_term, default_problems, parametrize_terms
from tests.support.third_party import CenteredTangent, GradientOuter, MeanTangent, Skewed, WeightedBlocks

FEW = [problem for problem in default_problems() if problem.size == 24][:2]
NORMALISED = "the matrix is divided by a norm over the chosen parameters"


@pytest.mark.parametrize("name", BUILTIN)
def test_registered_terms(name):
    check_term(name)


@pytest.mark.parametrize(
    "name", ["ggn_class", "ggn_cross", "ggn_within", "ggn_same", "ggn_diagonal", "centered_covariance_diagonal"]
)
def test_first_party_plugins(name):
    check_term(name, problems=FEW)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "kfoc", "foof"])
def test_matrices_of_whole_layers(name):
    check_term(f"{name}(rest='diagonal')")


@pytest.mark.parametrize(
    "term",
    [Skewed(0.5), MeanTangent()],
    ids=lambda term: type(term).__name__,
)
def test_third_party_terms(term):
    check_term(term)


def test_a_term_that_does_not_go_with_ignored_targets():
    counts = "the mean is over samples that are not ignored, the sum over all"
    check_term(CenteredTangent(), expected_failures={"facts": counts})


def test_a_term_that_is_made_for_some_models_only():
    check_term(WeightedBlocks(), problems=FEW)


def test_a_term_that_departs_from_the_contract_on_purpose():
    check_term(GradientOuter(2.0), problems=FEW, expected_failures={"restriction": NORMALISED, "blocks": NORMALISED})


@pytest.mark.parametrize(
    "text", ["2*ggn - residual.T / 3", "ggn_mc(samples=2, seed=3)", "jacobian.T", "empirical_fisher"]
)
def test_expressions_as_text(text):
    check_term(text, problems=FEW)


@pytest.mark.parametrize(
    "expr",
    [
        restrict(registry.build("hessian"), "*bias"),
    ],
    ids=str,
)
def test_other_expressions(expr):
    check_term(expr, problems=FEW)


def test_an_inverse():
    check_term(inverse(registry.build("ggn") + Identity), problems=FEW[:1])


def test_array_leaves_on_a_problem_of_their_size():
    problem = Problem(
        torch.nn.Linear(2, 1).double(), torch.nn.MSELoss(), (torch.ones(3, 2).double(), torch.ones(3, 1).double())
    )
    check_term(Diagonal(torch.tensor([1.0, 2.0, 3.0]).double()), problems=[problem])


@parametrize_terms(
    ["covariance_diagonal", GradientOuter()],
    expected_failures=lambda term: (
        {"restriction": NORMALISED, "blocks": NORMALISED} if isinstance(term, GradientOuter) else {}
    ),
)
def test_conformance(term, check):
    check(term)
