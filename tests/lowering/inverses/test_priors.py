"""Kronecker blocks with one damping for weights and another for biases: exact, in every order, with all its functions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from curvalg import FactsError, Identity, Problem, block_diagonal, inverse, registry, sqrt

WEIGHTS, BIASES = 0.3, 2.0


def make(*sizes: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())][:-1]
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x, y = torch.randn(9, sizes[0], generator=generator).double(), torch.arange(9) % sizes[-1]
    return Problem(model, nn.CrossEntropyLoss(), (x, y))


KFAC = registry.build("kfac")
PRIOR = block_diagonal({"*weight": WEIGHTS * Identity, "*bias": BIASES * Identity})


def prior(problem: Problem) -> torch.Tensor:
    values = [
        torch.full((s.numel(),), WEIGHTS if n.endswith("weight") else BIASES) for n, s in problem.layout.shapes.items()
    ]
    return torch.cat(values).double().diag()


@pytest.mark.parametrize("sizes", [(4, 3), (4, 5, 3)])
def test_functions_of_the_sum_are_those_of_its_dense_matrix(sizes: tuple[int, ...]) -> None:
    problem = make(*sizes)
    expected = 2 * KFAC.lower(problem).to_dense() + prior(problem) + 0.1 * torch.eye(problem.size).double()
    terms = [2 * KFAC, PRIOR / 2, PRIOR - PRIOR / 2, 0.1 * Identity]
    for order in itertools.permutations(terms, 4):
        op = sum(order[1:], order[0]).lower(problem)
        torch.testing.assert_close(op.to_dense(), expected)
    inverted = inverse(op.expr).lower(problem)
    torch.testing.assert_close(inverted.to_dense(), torch.linalg.inv(expected))
    assert "kronecker" in inverted.explain()
    torch.testing.assert_close(inverted.exact("diagonal"), torch.linalg.inv(expected).diagonal())
    assert inverted.exact("trace") == pytest.approx(float(torch.linalg.inv(expected).trace()))
    assert op.exact_rows() == 0
    assert op.exact("trace") == pytest.approx(float(expected.trace()))
    assert op.exact("logdet") == pytest.approx(float(torch.linalg.slogdet(expected)[1]))
    torch.testing.assert_close(op.exact("diagonal"), expected.diagonal())
    root = sqrt(op.expr).lower(problem).to_dense()
    torch.testing.assert_close(root @ root, expected)


def test_a_damping_of_weights_alone_is_solved_otherwise() -> None:
    problem = make(4, 3)
    weights = block_diagonal({"*weight": Identity})
    expr = KFAC + weights
    expected = KFAC.lower(problem).to_dense() + torch.tensor([1.0] * 12 + [0.0] * 3).double().diag()
    torch.testing.assert_close(expr.lower(problem).to_dense(), expected)
    if float(torch.linalg.svdvals(expected)[-1]) > 1e-8:
        torch.testing.assert_close(inverse(expr).lower(problem).to_dense(), torch.linalg.inv(expected))
    with pytest.raises(FactsError, match="no inverse"):
        inverse(weights).lower(problem)


@pytest.mark.parametrize("other", ["ggn", "ggn_diagonal", "ekfac", "foof", "hessian"])
def test_blocks_of_every_kind_are_added_in_every_order(other: str) -> None:
    problem = make(4, 5, 3)
    parts = [KFAC, registry.build("kfac", joint=False), block_diagonal(registry.build(other), by="module")]
    parts += [block_diagonal(registry.build(other)), -0.5 * KFAC, PRIOR]
    matrices = [part.lower(problem).to_dense() for part in parts]
    for i, j in itertools.permutations(range(len(parts)), 2):
        expr = parts[i] - 3 * parts[j] + parts[(i + 1) % len(parts)]
        expected = matrices[i] - 3 * matrices[j] + matrices[(i + 1) % len(parts)]
        torch.testing.assert_close(expr.lower(problem).to_dense(), expected)
