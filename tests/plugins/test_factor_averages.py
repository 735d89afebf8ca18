"""Moving averages of Kronecker factors, and the damping of factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Diagonal, Eigenbasis, Identity, Kronecker, OptionError, Problem, inverse, registry
from curvalg_plugins.kronecker import average_factors, damp_factors

build = registry.build


def problem_of(seed=0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)).double()
    torch.manual_seed(seed)
    return Problem(net, nn.CrossEntropyLoss(), (torch.randn(9, 2, 4, 4).double(), torch.randint(3, (9,))))


def test_factors_are_averaged_not_products():
    first, second = problem_of(), problem_of(1)
    old, new = (build("kfac").bound(p) for p in (first, second))
    running = average_factors(old, new, 0.9).lower(first)
    blocks = zip(running.structure, old.lower(first).structure, new.lower(first).structure, strict=True)
    for mixed, a, b in blocks:
        assert mixed.params == a.params
        for m, x, y in zip(mixed.factors, a.factors, b.factors, strict=True):
            torch.testing.assert_close(m, 0.9 * x + 0.1 * y)


def test_ends():
    first, second = problem_of(), problem_of(1)
    old, new = (build("kfac").bound(p) for p in (first, second))
    dense = [
        e.lower(first).to_dense() for e in (average_factors(old, new, 1.0), old, average_factors(old, new, 0.0), new)
    ]
    assert torch.equal(dense[0], dense[1])
    assert torch.equal(dense[2], dense[3])


def test_damped_factors_are_those_of_the_option():
    problem = problem_of()
    damped = damp_factors(build("kfac").bound(problem), 0.3).lower(problem).to_dense()
    option = build("kfac", factored_damping=0.3).lower(problem).to_dense()
    linear = [block.rows for block in build("kfac").lower(problem).structure if block.kind == "kronecker"]
    for rows in linear:
        torch.testing.assert_close(damped[rows[:, None], rows], option[rows[:, None], rows])


def test_the_inverse_of_damped_factors_is_exact():
    problem = problem_of()
    expr = damp_factors(build("kfac").bound(problem), 0.3)
    op, inverted = expr.lower(problem), inverse(expr).lower(problem)
    x = torch.randn(problem.size, 2).double()
    torch.testing.assert_close(op @ (inverted @ x), x)
    assert "Cholesky" in inverted.explain()
    assert inverted.exact("logdet") == pytest.approx(-float(torch.logdet(op.to_dense())))
    values = inverted.exact("eigh").eigenvalues
    torch.testing.assert_close(values.sort().values, torch.linalg.eigvalsh(inverted.to_dense()))


def test_products_that_are_not_definite_are_solved_by_their_spectrum():
    torch.manual_seed(0)
    a, b = (torch.randn(n, n).double() for n in (4, 3))
    problem = Problem(nn.Linear(3, 4, bias=False).double(), None, torch.randn(2, 3).double())
    op = inverse(Kronecker(a + a.T, b + b.T)).lower(problem)
    x = torch.randn(12).double()
    torch.testing.assert_close(torch.kron(a + a.T, b + b.T) @ (op @ x), x)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, True, "a", float("nan")])
def test_wrong_decays(wrong):
    leaf = Diagonal(torch.ones(3))
    with pytest.raises(OptionError, match="decay"):
        average_factors(leaf, leaf, wrong)


def test_what_cannot_be_averaged_is_named():
    problem = problem_of()
    kfac = build("kfac").bound(problem)
    with pytest.raises(OptionError, match="same blocks"):
        average_factors(kfac, build("kfac", joint=False).bound(problem))
    basis = Eigenbasis(torch.eye(3), torch.ones(3))
    with pytest.raises(OptionError, match="Eigenbasis"):
        average_factors(basis, basis)
    with pytest.raises(OptionError, match="damping"):
        damp_factors(kfac, 0.0)
    with pytest.raises(OptionError, match="Eigenbasis"):
        damp_factors(basis + Identity, 0.1)


def test_bases_in_double_precision_are_more_orthogonal():
    torch.manual_seed(0)
    net = nn.Linear(60, 3)
    problem = Problem(net, nn.CrossEntropyLoss(), (torch.randn(200, 60), torch.randint(3, (200,))))

    def error(**options):
        (block,) = build("ekfac", **options).lower(problem).structure
        q = block.basis[1].double()
        return float((q.T @ q - torch.eye(61).double()).norm())

    assert error(eigh_dtype="float64") < error()
    with pytest.raises(OptionError, match="eigh_dtype"):
        build("ekfac", eigh_dtype="float16")


def test_multiples_are_damped_by_the_same_number():
    problem = problem_of()
    diagonal, kfac = (build(name).bound(problem) for name in ("ggn_diagonal", "kfac"))
    damped, plain = (e.lower(problem).to_dense() for e in (damp_factors(17 * diagonal, 0.3), 17 * diagonal))
    torch.testing.assert_close(damped, plain + 0.3 * torch.eye(len(plain)).double())
    scaled, expected = damp_factors(4 * kfac, 0.3), 4 * damp_factors(kfac, 0.075)
    torch.testing.assert_close(scaled.lower(problem).to_dense(), expected.lower(problem).to_dense())
    for wrong in (-1 * kfac, kfac + Identity, kfac - 2 * diagonal):
        with pytest.raises(OptionError, match="positive multiple"):
            damp_factors(wrong, 0.1)
