"""Kronecker factors of parameters that are used otherwise from batch to batch, not at all, or as single numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg import Identity, Problem, ProblemError, inverse, registry
from curvalg.losses import CrossEntropy
from tests.support.layers import D, Lambda, param, random

build = registry.build


def batch(rows, length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return random(rows, length, 4, seed=seed), torch.randint(0, 3, (rows, length), generator=g)


def problem(forward, batches, **layers):
    torch.manual_seed(0)
    model = Lambda(lambda m, x: m.head(forward(m, x)), head=nn.Linear(4, 3), **layers).to(D)
    return Problem(model, CrossEntropy(class_axis=-1), batches)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "foof"])
@pytest.mark.parametrize("shape", [(6, 4), (1, 6, 4)])
def test_positions_cut_to_the_length_of_a_batch_have_the_factors_of_embedded_ones(name, shape):
    batches = [batch(3, 3), batch(2, 6, 1), batch(1, 1, 2), batch(3, 4, 3)]
    cut = problem(
        lambda m, x: (x + (m.places[: x.shape[1]] if len(shape) == 2 else m.places[:, : x.shape[1]])).tanh(),
        batches,
        places=param(*shape),
    )
    embedded = problem(
        lambda m, x: (x + F.embedding(torch.arange(x.shape[1]), m.places.view(6, 4))).tanh(),
        batches,
        places=param(*shape),
    )
    v = random(cut.size, 2)
    for expr in (build(name), inverse(build(name) + 0.1 * Identity)):
        got, expected = expr.lower(cut) @ v, expr.lower(embedded) @ v
        assert (got - expected).norm() <= 1e-9 * expected.norm()


CHANGING = {
    "a block of a bias": (lambda m, x: x + (m.w[: x.shape[1], : x.shape[1]] @ x), (6, 6)),
    "turned": (lambda m, x: x @ (m.w if x.shape[1] == 3 else m.w.T), (4, 4)),
    "mirrored": (lambda m, x: x @ (m.w if x.shape[1] == 3 else m.w.flip(0)), (4, 4)),
    "with other parts": (lambda m, x: x @ (m.w[:4] if x.shape[1] == 3 else m.w[2:]), (6, 4)),
    "with a bias": (
        lambda m, x: F.linear(x, m.w, m.head.weight.new_ones(4)) if x.shape[1] == 3 else x * m.w[0],
        (4, 4),
    ),
}


@pytest.mark.parametrize("name", ["kfac", "ekfac", "foof"])
@pytest.mark.parametrize("case", CHANGING)
def test_other_uses_in_other_batches_are_exact_or_refused(case, name):
    forward, shape = CHANGING[case]
    p = problem(forward, [batch(3, 3), batch(2, 5, 1)], w=param(*shape))
    at = p.layout.slices["w"]
    try:
        got = build(name).lower(p).to_dense()[at, at]
    except ProblemError as error:
        assert "no Kronecker factors for w" in str(error) and "Problem(params=...)" in str(error)
        return
    term = "covariance" if name == "foof" else "ggn"
    exact = build(term).lower(p).to_dense()[at, at]
    assert (got - exact).norm() <= 1e-9 * exact.norm()


@pytest.mark.parametrize("rest", ["small", "exact", "diagonal"])
@pytest.mark.parametrize("name", ["kfac", "ekfac", "foof"])
def test_a_single_number(name, rest):
    p = problem(lambda m, x: x * m.t, [batch(3, 3)], t=nn.Parameter(torch.tensor(0.7)))
    at = p.layout.slices["t"]
    exact = build("covariance" if name == "foof" else "ggn").lower(p).to_dense()[at, at]
    K = build(name, rest=rest)
    assert (K.lower(p).to_dense()[at, at] - exact).norm() <= 1e-10 * exact.norm()
    dense = (K + 0.1 * Identity).lower(p).to_dense()
    v = random(p.size, 1)
    assert (inverse(K + 0.1 * Identity).lower(p) @ v - torch.linalg.solve(dense, v)).norm() <= 1e-8 * v.norm()


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
@pytest.mark.parametrize("name", ["kfac", "foof"])
def test_no_numbers(name, shape):
    p = problem(lambda m, x: x + m.none.sum(), [batch(3, 3)], none=nn.Parameter(torch.zeros(shape)))
    K, v = build(name), random(p.size, 1)
    dense = (K + 0.1 * Identity).lower(p).to_dense()
    assert (inverse(K + 0.1 * Identity).lower(p) @ v - torch.linalg.solve(dense, v)).norm() <= 1e-8 * v.norm()


class Experts(nn.Module):
    """The third expert is never chosen, and is called all the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        h, chosen = x.new_zeros(len(x), 4), (x[:, 0] > 0).long()
        for i, expert in enumerate(self.experts):
            h[chosen == i] = expert(x[chosen == i]).tanh()
        return self.head(h)


@pytest.mark.parametrize("name", ["ggn", "covariance"])
def test_an_expert_without_rows(name):
    data = (random(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    plain, factored = (Problem(Experts(), nn.CrossEntropyLoss(), data, factored=f) for f in (False, True))
    v = random(plain.size, 3)
    expected = build(name).lower(plain) @ v
    assert (build(name).lower(factored) @ v - expected).norm() <= 1e-10 * expected.norm()
    damped = build(name) + 0.1 * Identity
    dense = damped.lower(plain).to_dense()
    solved = torch.linalg.solve(dense, v)
    assert (inverse(damped).lower(factored) @ v - solved).norm() <= 1e-8 * solved.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_packed_sequences_have_no_factors_and_right_products(kind, bias):
    torch.manual_seed(0)

    def forward(m, x):
        lengths = torch.arange(len(x), 0, -1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return m.head(nn.utils.rnn.pad_packed_sequence(m.rnn(packed)[0], batch_first=True)[0])

    model = Lambda(forward, rnn=kind(4, 4, batch_first=True, bias=bias), head=nn.Linear(4, 3)).to(D)
    p = Problem(model, CrossEntropy(class_axis=-1), [batch(3, 3)])
    exact = build("ggn").lower(p).to_dense()
    got = build("ggn_diagonal").lower(p) @ torch.ones(p.size).double()
    assert (got - exact.diagonal()).norm() <= 1e-9 * exact.diagonal().norm()
    with pytest.raises(ProblemError, match=r"rnn\.weight_hh_l0.*packed sequences.*rest="):
        build("kfac", rest="refuse").lower(p).prepare()
