"""KFOC: the optimum of a dense singular value decomposition, never worse than KFAC, whatever the split of the data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from curvalg import CurvalgWarning, Identity, OptionError, Problem, block_diagonal, inverse, parse, registry, restrict

build = registry.build


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Shared(nn.Module):
    """Layers whose weights are used at several positions, which do not add up one by one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2, bias=False).double()

    def forward(self, x):
        return self.last(self.first(x).tanh()).square().mean(1)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()


CASES = {
    "plain": (plain, (11, 3)),
    "shared": (Shared, (9, 4, 3)),
    "convolution": (convolution, (8, 2, 3, 3)),
}


def made(case, split=None, loss=None):
    model, shape = CASES[case][0](), CASES[case][1]
    X, y = random(*shape), random(shape[0], 2, seed=1)
    data = (X, y) if split is None else [(X[:split], y[:split]), (X[split:], y[split:])]
    return model, X, y, Problem(model, loss or nn.MSELoss(), data)


def gradients(model, X, y, fisher):
    """G of every column and sample by parameter, in plain torch, (columns, *shape)."""
    theta = {name: p.detach() for name, p in model.named_parameters()}
    J = jacrev(lambda p: functional_call(model, p, (X,)))(theta)
    n, c = y.shape
    if fisher == "exact":  # B = 2 / (n c) I
        return {name: (2 / (n * c)) ** 0.5 * part.flatten(0, 1) for name, part in J.items()}
    r = 2 * (model(X) - y).detach() / (n * c)
    return {name: n**0.5 * torch.einsum("nc,nc...->n...", r, part) for name, part in J.items()}


def blocks(found, joint):
    """The matrices G of each block with the slices of its rows; [W | b] for a weight and its bias."""
    names = list(found)
    for name in names:
        if not name.endswith("weight"):
            continue
        bias = name.replace("weight", "bias")
        G = found[name].flatten(2)
        if joint and bias in found:
            G = torch.cat([G, found[bias][..., None]], -1)
        yield name, bias if bias in found else None, G


def best(G):
    """The leading singular pair of the rearranged block as a dense matrix, and the least distance."""
    _, out, width = G.shape
    M = torch.einsum("koi,kpj->oipj", G, G)
    U, S, Vh = torch.linalg.svd(M.permute(0, 2, 1, 3).reshape(out * out, width * width), full_matrices=False)
    B, A = (S[0] * U[:, 0]).reshape(out, out), Vh[0].reshape(width, width)
    return torch.kron(B, A), torch.einsum("oipj->", M.square()) - S[0] ** 2


def in_joint_order(dense, problem, weight, bias, joint):
    """The rows of a weight and its bias as those of [W | b]."""
    at = problem.layout.slices[weight]
    places = torch.arange(at.start, at.stop).reshape(problem.layout.shapes[weight][0], -1)
    if joint and bias is not None:
        own = problem.layout.slices[bias]
        places = torch.cat([places, torch.arange(own.start, own.stop)[:, None]], 1)
    places = places.reshape(-1)
    return dense[places][:, places]


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_optimum_of_a_singular_value_decomposition(case, joint, fisher):
    model, X, y, problem = made(case, split=4)
    got = build("kfoc", fisher=fisher, joint=joint, iterations=300, tol=1e-10).lower(problem).to_dense()
    kfac = build("kfac", fisher=fisher, joint=joint).lower(problem).to_dense()
    for weight, bias, G in blocks(gradients(model, X, y, fisher), joint):
        expected, least = best(G)
        own = in_joint_order(got, problem, weight, bias, joint)
        torch.testing.assert_close(own, expected, atol=1e-8 * float(expected.norm()), rtol=1e-6)
        M = torch.einsum("ka,kb->ab", G.flatten(1), G.flatten(1))
        assert (own - M).square().sum() == pytest.approx(float(least), rel=1e-6, abs=1e-12 * float(M.square().sum()))
        assert (own - M).norm() <= (in_joint_order(kfac, problem, weight, bias, joint) - M).norm() + 1e-9 * M.norm()
    if not joint:
        exact = build("ggn" if fisher == "exact" else "covariance").lower(problem).to_dense()
        for name in (n for n in problem.layout.names if n.endswith("bias")):
            at = problem.layout.slices[name]
            torch.testing.assert_close(got[at, at], exact[at, at])


@pytest.mark.filterwarnings("ignore:kfoc")
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("case", CASES)
def test_never_worse_than_kfac_and_better_with_every_iteration(case, fisher):
    *_, problem = made(case, loss=nn.MSELoss(reduction="sum"))
    term = {"exact": "ggn", "mc": "ggn_mc", "empirical": "covariance"}[fisher]
    exact = block_diagonal(build(term), by="module").lower(problem).to_dense()
    errors = [
        (term.lower(problem).to_dense() - exact).norm()
        for term in (
            build("kfac", fisher=fisher),
            *(build("kfoc", fisher=fisher, iterations=i, tol=0) for i in (1, 2, 5)),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


def test_splits_of_the_data_agree():
    for case in CASES:
        one, other = (build("kfoc").lower(made(case, split)[-1]).to_dense() for split in (None, 3))
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("joint", [True, False])
def test_deep_linear_networks_are_exact(joint):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2, bias=False)).double()
    problem = Problem(model, nn.MSELoss(), (random(9, 5), random(9, 2, seed=1)))
    got = build("kfoc", joint=joint).lower(problem).to_dense()
    exact = block_diagonal(build("ggn"), by="module" if joint else "parameter").lower(problem).to_dense()
    torch.testing.assert_close(got, exact)


def test_class_losses_and_inverses():
    torch.manual_seed(0)
    X, y = random(12, 3), torch.arange(12) % 4
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    loss = nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1)
    problem = Problem(model, loss, [(X[:7], y[:7]), (X[7:], y[7:])])
    term = build("kfoc", tol=1e-6, iterations=100)
    exact = block_diagonal(build("ggn"), by="module").lower(problem).to_dense()
    dense = term.lower(problem).to_dense()
    assert (dense - exact).norm() < (build("kfac").lower(problem).to_dense() - exact).norm()
    assert torch.linalg.eigvalsh(dense)[0] > -1e-12
    op = inverse(term + 0.1 * Identity).lower(problem)
    b = random(problem.size, seed=5)
    torch.testing.assert_close(
        op @ b, torch.linalg.solve(dense + 0.1 * torch.eye(problem.size, dtype=torch.float64), b)
    )
    assert "kronecker" in op.explain()
    head = restrict(term, "2.*").lower(problem).to_dense()
    torch.testing.assert_close(head, dense[20:, 20:])


class Counted(nn.Linear):
    """Counts its calls."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


def test_one_pass_for_each_half_and_together_with_others():
    torch.manual_seed(0)
    model = nn.Sequential(Counted(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    X, y = random(12, 3), torch.arange(12) % 4
    problem = Problem(model, nn.CrossEntropyLoss(), (X, y), verify=False)
    kfac, ekfac, kfoc = build("kfac"), build("ekfac"), build("kfoc", iterations=3, tol=0)
    taken = []
    for expr in (kfac, kfac, kfoc, kfoc + ekfac + kfac):  # the first compares the records of layers
        before = Counted.calls
        _ = expr.lower(problem.with_data((X.clone(), y))) @ random(44)
        taken.append(Counted.calls - before)
    assert taken[2] == taken[3] == taken[1] + 2 * 3


def test_iterations_that_are_not_enough_are_said():
    *_, problem = made("plain")
    with pytest.warns(CurvalgWarning, match=r"more than tol=1e-12.*pass more iterations"):
        _ = build("kfoc", fisher="empirical", iterations=1, tol=1e-12).lower(problem).to_dense()


def test_printing_and_options():
    term = build("kfoc", fisher="mc", samples=2, iterations=5)
    assert parse(str(term)) == term
    *_, problem = made("plain")
    assert "at most 41 passes" in build("kfoc").lower(problem).explain()
    wrong = {
        "iterations": (0, True, 1.5),
        "tol": (-1, 1, float("nan")),
        "fisher": ("type-2",),
        "samples": (3,),
        "rest": ("x",),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(OptionError, match=name):
                build("kfoc", **{name: value})


class Scaled(nn.Module):
    """A layer whose block is a Kronecker product, times the square of a factor."""

    def __init__(self, factor):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.factor = nn.Linear(3, 2, bias=False), factor

    def forward(self, x):
        return self.layer(x) * self.factor


@pytest.mark.parametrize("factor", [1e-14, 1e-11, 1.0, 1e10])
def test_factors_whose_squares_leave_the_range_of_float32(factor):
    X, y = random(7, 3).float(), random(7, 2, seed=1).float()
    got = build("kfoc").lower(Problem(Scaled(factor), nn.MSELoss(), (X, y))).to_dense()
    unit = 2 / (7 * 2) * torch.kron(torch.eye(2), X.T @ X)  # J = x ⊗ I, B = 2 / (n c) I
    torch.testing.assert_close(got / factor / factor, unit, rtol=1e-4, atol=1e-5)
