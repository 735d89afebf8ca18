"""Stacks of Kronecker products, their numbers in any order: products, laws, inverses, roots and spectra against dense ones."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from curvalg import CheckpointError, Eigenbasis, Identity, Kronecker, OptionError, Problem, inv_sqrt, inverse, sqrt

G, SIZES, D = 2, (2, 5), 20


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def permutation():
    return torch.randperm(D, generator=torch.Generator().manual_seed(7))


def problem():
    return Problem(nn.Linear(5, 4, bias=False).double(), nn.MSELoss(), (random(3, 5), random(3, 4)))


def spd(*shape, seed):
    x = random(*shape, seed=seed)
    return x @ x.mT + 0.1 * torch.eye(shape[-1], dtype=x.dtype)


def dense(factors, order, count=G):
    stacks = factors if count else [f[None] for f in factors]
    whole = torch.block_diag(*(torch.kron(a, b) for a, b in zip(*stacks, strict=True)))
    if order is None:
        return whole
    result = torch.zeros_like(whole)
    result[order[:, None], order[None]] = whole
    return result


CASES = {
    "stacks": (G, False),
    "order": (None, True),
    "stacks in order": (G, True),
}


def leaf(case, make=spd, seed=0):
    count, reordered = CASES[case]
    sizes = SIZES if count else (4, 5)
    lead = (count,) if count else ()
    factors = [make(*lead, n, n, seed=seed + i) for i, n in enumerate(sizes)]
    order = permutation() if reordered else None
    return Kronecker(*factors, order=order), dense(factors, order, count)


def close(got, expected):
    assert (got - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("case", CASES)
def test_products_and_transposes(case):
    K, M = leaf(case, random)
    L, N = leaf(case, random, seed=10)
    p, v = problem(), random(D, 3, seed=3)
    for expr, matrix in ((K, M), (K.T, M.T), (2 * K @ L, 2 * M @ N), ((K @ L).T, (M @ N).T), (K @ L.T, M @ N.T)):
        close(expr.lower(p) @ v, matrix @ v)
    assert isinstance((K @ L).simplify(), Kronecker)
    close(pickle.loads(pickle.dumps(K)).lower(p) @ v, M @ v)


def test_products_of_different_orders_are_not_multiplied_factor_by_factor():
    (K, M), (L, N) = leaf("stacks"), leaf("stacks in order")
    close((K @ L).lower(problem()) @ random(D, 1), M @ N @ random(D, 1))
    assert not isinstance((K @ L).simplify(), Kronecker)


@pytest.mark.parametrize("case", CASES)
def test_inverses_roots_and_spectra_are_exact(case):
    (K, M), p, v, eye = leaf(case), problem(), random(D, 2, seed=3), torch.eye(D, dtype=torch.float64)
    for expr, matrix in ((K, M), (3 * K + 0.5 * Identity, 3 * M + 0.5 * eye)):
        op = inverse(expr).lower(p)
        close(op @ v, torch.linalg.solve(matrix, v))
        assert "kronecker: chosen" in op.explain()
        half = sqrt(expr).lower(p)
        close(half @ (half @ v), matrix @ v)
        root = inv_sqrt(expr).lower(p)
        close(root @ (root @ v), torch.linalg.solve(matrix, v))
        plain = expr.lower(p)
        assert abs(plain.exact("logdet") - torch.logdet(matrix)) <= 1e-9
        assert abs(plain.exact("trace") - matrix.trace()) <= 1e-9
        close(plain.exact("diagonal"), matrix.diagonal())
        pairs = plain.exact("eigh")
        close(pairs.eigenvalues, torch.linalg.eigvalsh(matrix))
        vectors = pairs.vectors(torch.tensor([0, 7, 19]))
        close(matrix @ vectors, vectors * pairs.eigenvalues[[0, 7, 19]])


@pytest.mark.parametrize("case", CASES)
def test_eigenbases(case):
    count, reordered = CASES[case]
    lead, sizes = ((count,), SIZES) if count else ((), (4, 5))
    bases = [torch.linalg.qr(random(*lead, n, n, seed=i))[0] for i, n in enumerate(sizes)]
    order = permutation() if reordered else None
    values = random(D, seed=5).square() + 0.1
    Q = dense(bases, order, count)
    E, M, p, v = (
        Eigenbasis(Kronecker(*bases, order=order), values),
        Q @ torch.diag(values) @ Q.T,
        problem(),
        random(D, 2),
    )
    close(E.lower(p) @ v, M @ v)
    close(inverse(E + 0.3 * Identity).lower(p) @ v, torch.linalg.solve(M + 0.3 * torch.eye(D, dtype=M.dtype), v))
    close(E.lower(p).exact("diagonal"), M.diagonal())


def test_a_matrix_that_is_not_symmetric_is_solved_in_another_way():
    K, M = leaf("stacks in order", random)
    op = inverse(K).lower(problem())
    close(op @ random(D, 1), torch.linalg.solve(M, random(D, 1)))
    assert "one of several products, or reordered" in op.explain()


def test_numpy_arrays_are_treated_alike():
    K, M = leaf("stacks in order")
    twin = Kronecker(*(f.numpy() for f in K.factors), order=K.order.numpy())
    close(twin.lower(problem()) @ random(D, 1), M @ random(D, 1))
    assert str(twin) == str(K) == "Kronecker<2 of 2 x 5, float64>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: ((np.ones((2, 2, 2)), np.ones((3, 3))), {}), "stacks of as many matrices each"),
        (lambda: ((np.ones((2, 2, 2)), np.ones((3, 3, 3))), {}), "stacks of as many matrices each"),
        (lambda: ((np.ones((2, 2, 3)),), {}), "must be square"),
        (lambda: ((np.eye(3),), {"order": np.array([0, 1, 1])}), "a permutation of the numbers from 0 to 2"),
        (lambda: ((np.eye(3),), {"order": np.arange(4)}), "a permutation of the numbers from 0 to 2"),
        (lambda: ((np.eye(3),), {"order": "abc"}), "order must be"),
    ],
)
def test_bad_arguments(arguments, message):
    args, kwargs = arguments()
    with pytest.raises(OptionError, match=message):
        Kronecker(*args, **kwargs)


def test_a_run_with_another_order_is_another_run(tmp_path):
    p, b, factors = problem(), random(D, seed=4), [spd(G, n, n, seed=n) for n in SIZES]
    inverses = [inverse(Kronecker(*factors, order=order), solver="cg").lower(p) for order in (permutation(), None)]
    inverses[0].solve(b, checkpoint=tmp_path / "run")
    inverses[0].solve(b, checkpoint=tmp_path / "run")
    with pytest.raises(CheckpointError, match="arrays of the expression"):
        inverses[1].solve(b, checkpoint=tmp_path / "run")
