"""The neural tangent kernel: J Jᵀ from layer inputs and deltas, within one data set and between two."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Identity, Problem, ProblemError, inverse, registry
from curvalg_plugins.ntk import cross_kernel

CASES = ["mlp", "cnn", "sequence_classes_second", "tied_embedding", "encoder_layer"]
build = registry.build


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jacobian(problem):
    return build("jacobian").lower(problem).to_dense()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("case", CASES)
def test_is_the_gram_matrix_of_the_jacobian(case, problem_of, inside):
    problem = problem_of(case)
    J = jacobian(problem)
    op = build("ntk").lower(problem)
    inside(product=None)  # no product
    assert (op.to_dense() - J @ J.T).norm() <= 1e-10 * (J @ J.T).norm()
    eigenvalues = (build("ntk") / 2 + Identity).lower(problem).exact("eigh").eigenvalues
    assert torch.allclose(eigenvalues, torch.linalg.eigvalsh(J @ J.T / 2) + 1, atol=1e-9)


def test_kernel_regression_is_exact(problem_of, vectors):
    problem = problem_of("mlp")
    op = inverse(build("ntk") + 0.1 * Identity).lower(problem)
    J, V = jacobian(problem), vectors(op.shape[0])
    expected = torch.linalg.solve(J @ J.T + 0.1 * torch.eye(len(J)).double(), V)
    assert torch.allclose(op @ V, expected, atol=1e-9)
    assert int(op.last_solve.iterations.max()) == 0
    assert "kernel: chosen, J J.T" in op.explain()


def test_a_budget_that_is_too_small_leaves_products(problem_of):
    model = net()
    op = build("ntk").lower(Problem(model, None, random(5, 3), cache=100))
    whole = build("ntk").lower(Problem(model, None, random(5, 3)))
    assert torch.allclose(op.to_dense(), whole.to_dense(), atol=1e-12)
    assert op.exact("trace") == pytest.approx(whole.exact("trace"))


@pytest.mark.parametrize("width", [1, 32])
def test_between_two_data_sets(width, inside):
    inside(kernel_width=width)
    model = net()
    train = Problem(model, nn.CrossEntropyLoss(), [(random(n, 3, seed=n), torch.zeros(n).long()) for n in (4, 1, 3)])
    test = Problem(model, None, [random(n, 3, seed=n) for n in (7, 2)])
    K = cross_kernel(test, train)
    expected = jacobian(test) @ jacobian(train).T
    assert K.shape == (18, 16)
    assert torch.allclose(K, expected, atol=1e-12)
    assert torch.allclose(cross_kernel(train, train), build("ntk").lower(train).to_dense(), atol=1e-12)


class Partly(nn.Module):
    """Uses its second layer where there are more than two rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.first(x) + self.second(x) if len(x) > 2 else self.first(x)


def test_layers_that_one_of_the_data_sets_does_not_use():
    model = Partly().double()
    few, many = Problem(model, None, random(2, 3)), Problem(model, None, random(4, 3, seed=1))
    assert torch.allclose(cross_kernel(few, many), jacobian(few) @ jacobian(many).T, atol=1e-12)


def test_problems_of_two_models_are_refused():
    model, other = net(), net()
    left = Problem(model, None, random(2, 3))
    with pytest.raises(ProblemError, match=r"the parameters differ in \['0.bias'"):
        cross_kernel(left, Problem(model, None, random(2, 3), params=["0.weight"]))
    with torch.no_grad():
        other[0].bias += 1
    with pytest.raises(ProblemError, match=r"the values of '0.bias' differ"):
        cross_kernel(left, Problem(other, None, random(2, 3)))
    with pytest.raises(ProblemError, match=r"two problems, got Tensor; write Problem\(model, None, inputs\)"):
        cross_kernel(left, random(2, 3))
    with pytest.raises(ProblemError, match=r"torch\.float32"):
        cross_kernel(left, Problem(net().float(), None, random(2, 3).float()))
