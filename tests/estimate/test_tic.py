"""Takeuchi's trace, influence functions and gradient noise, against dense matrices and theory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import ExpressionError, FactsError, Identity, Problem, ProblemError, inverse, registry, restrict
from curvalg.estimate import bilinear, gradient_noise, gradient_norms, influence, tic

build = registry.build


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classifier(sizes=(20, 16, 4), rows=60, samples="item"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.Tanh(), nn.Linear(sizes[1], sizes[2])).double()
    X, y = random(rows, sizes[0]), torch.arange(rows) % sizes[2]
    return Problem(net, nn.CrossEntropyLoss(), [(X[:25], y[:25]), (X[25:], y[25:])], samples=samples)


def exact(problem, hessian, covariance, damping):
    A = build(hessian).lower(problem).to_dense() + damping * torch.eye(problem.size).double()
    return float(torch.linalg.solve(A, build(covariance).lower(problem).to_dense()).trace())


@pytest.mark.parametrize("covariance", ["covariance", "centered_covariance", "kfac"])
@pytest.mark.parametrize("hessian", ["ggn", "hessian"])
def test_tic_is_the_trace(hessian, covariance):
    """By the small matrix Vᵀ(H + λ)⁻¹V where the covariance has columns, else by the large one."""
    problem = classifier()
    assert problem.size > 256
    truth = exact(problem, hessian, covariance, 0.1)
    found = tic(problem, hessian=build(hessian), covariance=build(covariance), damping=0.1, products=40)
    assert abs(found.value - truth) <= 4 * found.error + 1e-6 * truth
    assert found.error < 0.3 * truth


def test_tic_of_few_parameters_is_exact():
    problem = classifier((4, 3, 3))
    found = tic(problem, hessian=build("ggn"), damping=0.1)
    assert found.method == "exact" and found.error == 0
    assert found.value == pytest.approx(exact(problem, "ggn", "covariance", 0.1))


def test_tic_of_a_well_specified_model_is_the_number_of_parameters():
    """Logistic regression on labels that it drew itself, at the maximum of the likelihood."""
    X = random(20_000, 5)
    draw = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = (draw < torch.sigmoid(X @ random(5, seed=2))).double()[:, None]
    model = nn.Linear(5, 1, bias=False).double()
    problem = Problem(model, nn.BCEWithLogitsLoss(), (X, y))
    for _ in range(10):  # Newton's method
        step = inverse(build("hessian")).lower(problem) @ problem.gradient()
        with torch.no_grad():
            model.weight -= step.reshape(1, 5)
    assert float(problem.gradient().norm()) < 1e-10
    assert tic(problem).value == pytest.approx(5, rel=0.05)


def test_tic_refuses():
    problem = classifier((4, 3, 3))
    for options, message in (
        ({"damping": -1.0}, "damping"),
        ({"hessian": "ggn"}, "hessian is an expression"),
        ({"covariance": build("jacobian")}, "covariance is an expression on parameters"),
    ):
        with pytest.raises(ExpressionError, match=message):
            tic(problem, **options)


def test_tic_of_a_singular_matrix_says_what_to_pass():
    X = torch.zeros(8, 3).double()
    problem = Problem(nn.Linear(3, 1, bias=False).double(), nn.MSELoss(), (X, random(8, 1)))
    with pytest.raises(FactsError, match="pass damping="):
        tic(problem)
    with pytest.raises(FactsError, match=r"tic: .*damping="):
        tic(classifier(rows=40), hessian=build("ggn"))


def test_tic_is_exact_where_that_is_asked_for():
    problem = classifier()
    found = tic(problem, hessian=build("ggn"), damping=0.1, method="exact")
    assert found.method == "exact" and found.value == pytest.approx(exact(problem, "ggn", "covariance", 0.1))


@pytest.mark.parametrize("samples", ["item", "position"])
def test_influence_is_the_inner_product_with_every_gradient(samples, problem_of):
    problem = problem_of("sequence_classes_second", samples=samples)
    op = inverse(build("ggn") + 0.1 * Identity).lower(problem)
    V = random(problem.size, 2, seed=3)
    with problem.batches() as batches:
        rows = [torch.cat([g.flatten(1) for g in b.per_sample_gradients().values()], 1) for b in batches]
    expected = torch.cat(rows) @ (op @ V)
    assert torch.allclose(influence(op, V), expected, atol=1e-9)
    assert torch.allclose(influence(op, V[:, 0]), expected[:, 0], atol=1e-9)
    assert torch.allclose(influence(op, problem.layout.unflatten(V[:, 0])), expected[:, 0], atol=1e-9)


def test_influence_predicts_what_leaving_a_sample_out_does():
    """Ridge-free linear regression: the prediction is exact to first order in 1/N."""
    X, y = random(200, 3), random(200, 1, seed=1)
    probe = random(3, seed=2)

    def fit(keep):
        return torch.linalg.lstsq(X[keep], y[keep]).solution

    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(fit(torch.arange(200)).T)
    problem = Problem(model, nn.MSELoss(), (X, y))
    # The test loss is probeᵀθ, whose gradient is the probe.
    predicted = influence(inverse(build("hessian")).lower(problem), probe)
    whole = float(probe @ fit(torch.arange(200))[:, 0])
    true = [float(probe @ fit(torch.arange(200) != n)[:, 0]) - whole for n in range(200)]
    assert torch.corrcoef(torch.stack([predicted, torch.tensor(true, dtype=torch.float64)]))[0, 1] > 0.999
    assert torch.allclose(predicted, torch.tensor(true, dtype=torch.float64), rtol=0.15, atol=1e-4)


def test_bilinear_forms():
    problem = classifier((4, 3, 3))
    op = inverse(build("ggn") + 0.1 * Identity).lower(problem)
    g, h = random(problem.size, 2), random(problem.size, 3, seed=1)
    assert torch.allclose(bilinear(op, g, h), g.T @ (op @ h))
    assert bilinear(op, g[:, 0], h).shape == (1, 3)
    J = build("jacobian").lower(problem)
    assert bilinear(J, random(J.shape[0]), h).shape == (1, 3)


def test_influence_refuses_other_operators():
    problem = classifier((4, 3, 3))
    with pytest.raises(ExpressionError, match="all 27 parameters"):
        influence(build("loss_hessian").lower(problem), torch.ones(180).double())
    with pytest.raises(ExpressionError, match="expected a CurvatureOperator, got Tensor"):
        influence(torch.eye(3), torch.ones(3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_noise_scale_is_that_of_the_gradients(reduction):
    torch.manual_seed(0)
    net, X, y = nn.Linear(4, 3).double(), random(50, 4), torch.arange(50) % 3
    problem = Problem(net, nn.CrossEntropyLoss(reduction=reduction), [(X[:20], y[:20]), (X[20:], y[20:])])
    rows = []
    for n in range(50):
        grads = torch.autograd.grad(
            nn.functional.cross_entropy(net(X[n : n + 1]), y[n : n + 1]), list(net.parameters())
        )
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    G = torch.stack(rows)
    noise = gradient_noise(problem)
    assert noise.trace == pytest.approx(float(G.var(0).sum()))
    assert noise.square == pytest.approx(float(G.mean(0).square().sum() - G.var(0).sum() / 50))
    assert noise.simple == pytest.approx(noise.trace / noise.square) or noise.square <= 0
    assert torch.allclose(gradient_norms(problem) * (50 if reduction == "mean" else 1), G.norm(dim=1))


def test_the_noise_scale_is_infinite_where_the_gradient_vanishes():
    X, y = random(40, 3), random(40, 1, seed=1)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(X, y).solution.T)
    noise = gradient_noise(Problem(model, nn.MSELoss(), (X, y)))
    assert noise.simple == float("inf") and noise.square < 0


def test_one_sample_has_no_noise():
    with pytest.raises(ProblemError, match="at least two samples"):
        gradient_noise(Problem(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(1, 2), torch.ones(1, 1))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hessian", ["ggn", "kfac"])
def test_tic_of_a_matrix_that_is_singular_up_to_rounding_is_no_number(hessian, dtype):
    """More parameters than outputs: the smallest eigenvalues are noise of either sign."""
    problem = classifier((4, 5, 3), rows=8)
    problem = Problem(
        problem.model.module.to(dtype), nn.CrossEntropyLoss(), [(random(8, 4).to(dtype), torch.arange(8) % 3)]
    )
    with pytest.raises(FactsError, match=r"singular up to rounding .* pass damping="):
        tic(problem, hessian=build(hessian))


def test_what_is_no_problem_is_refused():
    op = build("ggn").lower(classifier((4, 3, 3)))
    for function in (tic, gradient_noise, gradient_norms):
        with pytest.raises(ExpressionError, match=f"{function.__name__}: expected a Problem, got CurvatureOperator"):
            function(op)


def test_tic_is_about_all_parameters():
    problem = classifier((4, 3, 3))
    for options in ({"hessian": restrict(build("ggn"), "0.*")}, {"covariance": restrict(build("covariance"), "0.*")}):
        with pytest.raises(ExpressionError, match="all of them"):
            tic(problem, damping=0.1, **options)


def test_the_error_of_tic_covers_the_tolerance_of_its_solves():
    problem = classifier()
    found = tic(problem, hessian=build("ggn"), damping=0.1, method="xnystrace", products=60)
    assert found.error >= 1e-8 * found.value
