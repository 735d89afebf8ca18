"""What goes wrong numerically for people who do this work; one test named after each complaint."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvalg import ConvergenceError, ExpressionError, Identity, Problem, inverse, registry
from curvalg.estimate import eigsh, trace
from curvalg.losses import CrossEntropy

build = registry.build


def problem(dtype=torch.float64, sizes=(6, 8, 3), rows=30):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.Tanh(), nn.Linear(sizes[1], sizes[2])).to(dtype)
    return Problem(net, nn.CrossEntropyLoss(), (torch.randn(rows, sizes[0]).to(dtype), torch.arange(rows) % sizes[2]))


def test_an_indefinite_matrix_is_not_left_to_conjugate_gradients_and_failure_is_loud():
    p = problem()
    A = build("hessian").lower(p).to_dense()
    assert torch.linalg.eigvalsh(A)[0] < -1e-3
    op = inverse(build("hessian") + 0.01 * Identity, solver="minres").lower(p)
    b = torch.ones(p.size).double()
    expected = torch.linalg.solve(A + torch.eye(p.size).double() / 100, b)
    assert (op @ b - expected).norm() <= 1e-5 * expected.norm()
    with pytest.raises(ConvergenceError, match="non-positive curvature"):
        inverse(build("hessian") + 0.01 * Identity, solver="cg").lower(p) @ b


def test_a_solve_does_not_stop_after_eleven_loose_iterations():
    p = problem()
    op = inverse(build("ggn") + 1e-5 * Identity, solver="cg", rtol=1e-10).lower(p)
    b = torch.ones(p.size).double()
    result = op.solve(b)
    assert int(result.iterations.max()) > 11 and float(result.residual.max()) <= 1e-10 * b.norm()
    with pytest.raises(ConvergenceError, match="11 iterations were not enough"):
        inverse(build("ggn") + 1e-5 * Identity, solver="cg", rtol=1e-10, maxiter=11).lower(p) @ b


def test_eigenvalues_near_zero_have_a_way_that_works():
    p = problem()
    with pytest.raises(ExpressionError, match=r"largest of the inverse: eigsh\(inverse\(A\)"):
        eigsh(build("ggn").lower(p), 3, which="SM")
    damped = build("ggn") + 0.1 * Identity
    smallest = 1 / eigsh(inverse(damped).lower(p), 3, which="LM", tol=1e-8).eigenvalues
    exact = torch.linalg.eigvalsh(damped.lower(p).to_dense())
    assert torch.allclose(smallest.sort().values, exact[:3], rtol=1e-6)


def test_eigendecompositions_that_give_nan_in_single_precision_are_done_in_double(monkeypatch):
    p, eigh = problem(torch.float32), torch.linalg.eigh
    expected = build("ekfac").lower(p) @ torch.ones(p.size)

    def fragile(matrix, *args):
        values, vectors = eigh(matrix, *args)
        return (values, vectors * float("nan")) if matrix.dtype == torch.float32 else (values, vectors)

    monkeypatch.setattr(torch.linalg, "eigh", fragile)
    got = build("ekfac").lower(problem(torch.float32)) @ torch.ones(p.size)
    assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_products_are_exact_to_the_last_digits_and_not_finite_differences():
    p = problem()
    v = torch.randn(p.size, generator=torch.Generator().manual_seed(1)).double()
    names, values = zip(*p.model.module.named_parameters(), strict=True)
    (X, y) = p.data.source[0]

    def loss(*params):
        z = torch.func.functional_call(p.model.module, dict(zip(names, params, strict=True)), (X,))
        return nn.functional.cross_entropy(z, y)

    tangents = tuple(t.reshape(q.shape) for t, q in zip(v.split([q.numel() for q in values]), values, strict=True))
    expected = torch.cat([t.reshape(-1) for t in torch.autograd.functional.hvp(loss, values, tangents)[1]])
    assert (build("hessian").lower(p) @ v - expected).norm() <= 1e-13 * expected.norm()


def test_long_runs_have_no_ghosts_and_right_multiplicities():
    spectrum = torch.cat([torch.linspace(0, 1, 290), torch.tensor([5.0] * 3 + [4.0] * 2 + [3.0])]).double()
    Q = torch.linalg.qr(torch.randn(296, 296, generator=torch.Generator().manual_seed(0)).double()).Q
    found = eigsh(Q @ torch.diag(spectrum) @ Q.T, 7, which="LA", tol=1e-10).eigenvalues
    assert torch.allclose(found, spectrum.sort().values[-7:], atol=1e-8)


def test_probes_follow_the_seed_and_nothing_else():
    op = build("hessian").lower(problem(sizes=(10, 20, 5)))
    torch.manual_seed(3)
    first = trace(op, products=20, method="hutchinson")
    torch.manual_seed(4)
    state = torch.random.get_rng_state()
    assert trace(op, products=20, method="hutchinson").value == first.value
    assert torch.equal(torch.random.get_rng_state(), state)
    assert trace(op, products=20, method="hutchinson", seed=1).value != first.value


def test_estimates_stop_by_their_standard_error():
    op = build("hessian").lower(problem(sizes=(10, 20, 5)))
    exact = float(op.to_dense().trace())
    estimate = trace(op, products=10, tol=0.1, method="hutchinson", maxiter=5000)
    assert estimate.converged and estimate.error <= 0.1 * abs(estimate.value)
    assert abs(estimate.value - exact) <= 4 * estimate.error


def test_a_last_layer_of_thousands_of_classes_needs_no_jacobian_of_a_sample():
    classes, width, rows = 3100, 8, 4
    torch.manual_seed(0)
    net = nn.Linear(width, classes, bias=False)
    X, y = torch.randn(rows, width), torch.randint(0, classes, (rows,))
    op = build("ggn").lower(Problem(net, nn.CrossEntropyLoss(), (X, y)))
    V = torch.randn(classes, width)
    p = net(X).softmax(1)
    tangent = X @ V.T
    expected = ((p * tangent - p * (p * tangent).sum(1, keepdim=True)).T @ X) / rows
    assert torch.allclose(op @ V.reshape(-1), expected.reshape(-1), rtol=1e-3, atol=1e-6)


def test_integers_do_not_truncate_and_the_precision_is_that_of_the_model():
    p = problem(torch.float32)
    op = build("ggn").lower(p)
    assert op.dtype == np.float32
    whole = np.arange(p.size)
    assert np.allclose(op @ whole, op @ whole.astype(np.float64), rtol=1e-4)
    assert (op @ whole).dtype.kind == "f" and (op @ torch.arange(p.size)).is_floating_point()


def test_inverses_have_adjoints_and_operators_survive_pickling():
    p = problem()
    op, b = inverse(build("ggn") + 0.1 * Identity).lower(p), torch.ones(p.size).double()
    assert torch.allclose(op.adjoint() @ b, op @ b)
    assert torch.allclose(pickle.loads(pickle.dumps(op)) @ b, op @ b)


def test_a_vocabulary_of_50k_is_taken_in_chunks_and_nothing_of_that_size_is_kept():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            found = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.device.type != "meta"]
            self.elements = max([self.elements, *(t.numel() for t in found)])
            return result

    vocabulary, shape = 50_000, (4, 256)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(vocabulary, 4), nn.LayerNorm(4), nn.Linear(4, vocabulary, bias=False))
    net[2].weight = net[0].weight
    batch = (torch.randint(vocabulary, shape), torch.randint(vocabulary, shape))
    p = Problem(net, CrossEntropy(class_axis=-1), batch)
    op = build("ggn").lower(p)
    with Largest() as seen:
        op @ torch.randn(p.size)
    assert seen.elements <= p.output_memory / 4 / 4 < vocabulary * batch[1].numel() / 10
    assert "outputs of 50000 classes in chunks of 55 positions through the last linear layer" in op.explain()
    assert p.budget.used < 2**20
