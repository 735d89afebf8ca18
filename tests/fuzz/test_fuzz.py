"""Random problems against plain torch: a hundred in the ordinary run, five thousand with CURVALG_NIGHTLY=1."""

from __future__ import annotations

import copy
import os
import random
import warnings

import pytest
import torch

from curvalg import CurvalgError, Identity, Problem, block_diagonal, inverse, registry, restrict
from tests.support.fuzz.grammar import draw
from tests.support.fuzz.reference import Reference

NIGHTLY = os.environ.get("CURVALG_NIGHTLY") == "1"
SEEDS = range(5000 if NIGHTLY else 100)
ROUTES = [{}, {}, {"cache": 0}, {"columns": "loop"}, {"factored": True}, {"cache": 3000}, {"columns": 2}]
B = registry.build


def expressions(reference, problem):
    """name -> (expression, dense matrix, whether it needs second derivatives of the model)."""
    ggn, covariance, hessian = reference.ggn, reference.covariance, reference.autograd_hessian
    eye = torch.eye(problem.size).double()
    first = problem.layout.names[0]
    place = problem.layout.slices[first]
    blocks = torch.block_diag(*[ggn[s, s] for s in problem.layout.slices.values()])
    return {
        "ggn": (B("ggn"), ggn),
        "covariance": (B("covariance"), covariance),
        "centered_covariance": (B("centered_covariance"), reference.centered_covariance),
        "jacobian": (B("jacobian"), reference.jacobian),
        "ggn_diagonal": (B("ggn_diagonal"), ggn.diagonal().diag()),
        "covariance_diagonal": (B("covariance_diagonal"), covariance.diagonal().diag()),
        "blocks": (block_diagonal(B("ggn")), blocks),
        "restricted": (restrict(B("ggn"), first), ggn[place, place]),
        "mixed": (2 * B("ggn") - B("covariance") / 3 + 0.5 * Identity, 2 * ggn - covariance / 3 + 0.5 * eye),
        "product": (B("ggn") @ B("covariance"), ggn @ covariance),
        "inverse": (inverse(B("ggn") + Identity), torch.linalg.inv(ggn + eye)),
        "hessian": (B("hessian"), hessian),
        "residual": (B("residual"), hessian - ggn),
        "sum": (B("hessian") - 2 * B("covariance"), hessian - 2 * covariance),
    }


CURVED = {"hessian", "residual", "sum"}


def compare(got, expected, scale, what):
    error = float((got - expected).norm())
    assert error <= 1e-7 * (float(expected.norm()) + scale), (
        f"{what}: error {error:.2g} beside {float(expected.norm()):.2g}"
    )


def trusted(reference):
    """Whether torch's own double backward is right on this model (central differences agree, away from kinks)."""
    difference = reference.hessian - reference.autograd_hessian
    return float(difference.norm()) <= 1e-4 * (1 + float(reference.hessian.norm()))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_drawn_problem(seed):
    r = random.Random(seed)
    drawn = draw(seed)
    twin = copy.deepcopy(drawn.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = Reference(drawn)
    try:
        finite = torch.isfinite(reference.total) and torch.isfinite(reference.gradient).all()
    except RuntimeError as error:  # the model writes in place into what its own backward pass needs
        assert "modified by an inplace operation" in str(error)
        with pytest.raises(CurvalgError):
            Problem(drawn.model, drawn.loss, drawn.batches, **drawn.options).gradient()
        return
    if not finite:
        pytest.skip("the loss is not finite there")
    route = r.choice(ROUTES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = Problem(drawn.model, drawn.loss, drawn.batches, **drawn.options, **route)
        assert problem.value() == pytest.approx(float(reference.total.detach()), rel=1e-9, abs=1e-12)
        compare(problem.gradient(), reference.gradient, 1e-3, "gradient")
        chosen = r.sample(list(expressions(reference, problem).items()), 5)
        for name, (expr, expected) in chosen:
            op = None
            try:
                op = expr.lower(problem)
                V = torch.randn(op.shape[1], 3, generator=torch.Generator().manual_seed(seed)).double()
                products = [
                    (op @ V[:, 0], expected @ V[:, 0]),
                    (op @ V, expected @ V),
                    (op @ V[:, 0], expected @ V[:, 0]),
                ]
            except CurvalgError as error:
                # Only a second derivative that is wrong, or not there, may be refused.
                assert name in CURVED, f"{name} of seed {seed} on {route}: {error}"
                assert "second" in str(error) or not trusted(reference), error
                continue
            if name in CURVED and not trusted(reference):
                continue  # nothing to compare with: torch's derivative is wrong, or a kink is near
            for got, want in products:
                compare(got, want, 1e-3, f"{name} of seed {seed} on {route}: {drawn.model} {drawn.loss}")
    for (name, p), q in zip(drawn.model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(p, q), f"{name} was changed"
