"""The operator as SciPy sees it, its algebra, its life with a changing model, and what it leaves untouched."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from curvalg import (
    CurvatureOperator,
    ExpressionError,
    Identity,
    Problem,
    ProblemError,
    StaleError,
    block_diagonal,
    inverse,
    registry,
    restrict,
)
from tests.support.zoo import ZOO, make


@pytest.fixture
def ggn(problem_of):
    return (registry.build("ggn") + 0.1 * Identity).lower(problem_of("mlp"))


# -- SciPy --------------------------------------------------------------------------------------------------------------


def test_scipy_solvers_accept_it(ggn):
    A = ggn.to_dense().numpy()
    n = len(A)
    b = np.linspace(-1, 1, n)
    w = np.linalg.eigvalsh(A)
    assert isinstance(ggn, sla.LinearOperator)
    assert sla.aslinearoperator(ggn) is ggn
    np.testing.assert_allclose(sla.eigsh(ggn, k=3, v0=b)[0], w[-3:], rtol=1e-8)
    np.testing.assert_allclose(np.sort(sla.svds(ggn, k=3, v0=b)[1]), w[-3:], rtol=1e-8)
    X = np.linalg.qr(np.random.default_rng(0).standard_normal((n, 3)))[0]
    np.testing.assert_allclose(np.sort(sla.lobpcg(ggn, X, tol=1e-10, maxiter=200)[0]), w[-3:], rtol=1e-6)
    for solver in (sla.cg, sla.minres):
        np.testing.assert_allclose(A @ solver(ggn, b, rtol=1e-10)[0], b, atol=1e-7)
    np.testing.assert_allclose(sla.expm_multiply(ggn, b, traceA=np.trace(A)), np.asarray(_expm(A) @ b), rtol=1e-8)


def _expm(A):
    w, V = np.linalg.eigh(A)
    return V @ np.diag(np.exp(w)) @ V.T


def test_rectangular_svds(problem_of):
    J = registry.build("jacobian").lower(problem_of("mlp"))
    s = np.linalg.svd(J.to_dense().numpy(), compute_uv=False)
    np.testing.assert_allclose(np.sort(sla.svds(J, k=3, v0=np.ones(min(J.shape)))[1])[::-1], s[:3], rtol=1e-8)


def test_scipy_arithmetic_with_foreign_operators(ggn):
    n = ggn.shape[0]
    foreign = sla.aslinearoperator(np.diag(np.arange(n, dtype=float)))
    A, F, x = ggn.to_dense().numpy(), np.diag(np.arange(n)), np.ones(n)
    for op, dense in (
        (ggn + foreign, A + F),
        (foreign + ggn, A + F),
        (ggn @ foreign, A @ F),
        (foreign @ ggn, F @ A),
        (ggn - foreign, A - F),
        (2j * ggn, 2j * A),
        (ggn.H @ foreign, A.T @ F),
    ):
        np.testing.assert_allclose(op @ x, dense @ x, rtol=1e-10)


# -- bound algebra ---------------------------------------------------------------------------------------------------------


def test_operators_of_one_problem_combine_as_expressions(problem_of, vectors):
    problem = problem_of("mlp")
    h, g = (registry.build(n).lower(problem) for n in ("hessian", "ggn"))
    H, G, V = h.to_dense(), g.to_dense(), vectors(problem.size)
    for op, dense, text in (
        (h + g, H + G, "hessian + ggn"),
        (h - 2 * g, H - 2 * G, "hessian - 2*ggn"),
        (h @ g, H @ G, "hessian @ ggn"),
        (-h / 4, -H / 4, "-0.25*hessian"),
        (h**2, H @ H, "hessian @ hessian"),
        (h + 0.5 * Identity, H + torch.eye(len(H)) / 2, "hessian + 0.5*identity"),
        ((h @ g).T, G @ H, "(hessian @ ggn).T"),
        (h * 3.0, 3 * H, "3*hessian"),
    ):
        assert isinstance(op, CurvatureOperator)
        assert str(op.expr) == text
        assert torch.allclose(op @ V, dense @ V, atol=1e-12)


def test_operators_of_different_problems_combine_lazily(problem_of):
    a, b = (registry.build("ggn").lower(problem_of("mlp", options)) for options in (None, make("mlp", 1).batches))
    both = a + b
    x = np.ones(a.shape[0])
    assert not isinstance(both, CurvatureOperator)
    np.testing.assert_allclose(both @ x, a @ x + b @ x)


# -- one model call per batch and product -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "cnn", "lstm", "tied_embedding"])
def test_a_sum_calls_the_model_once_per_batch_and_product(model, counted_model):
    problem, calls = counted_model(model, cache=0, verify=False)
    build = registry.build
    op = (2 * build("hessian") + build("ggn") - 3 * build("covariance")).lower(problem)
    v = torch.ones(problem.size).double()
    for _ in range(3):
        before = calls()
        op @ v
        assert calls() - before == len(problem.data.source) == 3


def test_a_sum_without_u_calls_it_twice(counted_model):
    problem, calls = counted_model("mlp", cache=0, verify=False)
    op = (registry.build("ggn") + registry.build("covariance")).lower(problem)
    before = calls()
    op @ torch.ones(problem.size).double()
    assert calls() - before == 2 * 3


def test_lowering_calls_no_model(counted_model):
    problem, calls = counted_model("mlp")
    (registry.build("hessian") + registry.build("centered_covariance")).lower(problem).explain()
    assert calls() == 0


# -- a changing model ---------------------------------------------------------------------------------------------------------


def _plain(model):
    opt = torch.optim.SGD(model.parameters(), 0.1)
    _backward(model)
    opt.step()


def _fused(model):
    opt = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    _backward(model)
    opt.step()


def _backward(model):
    model(torch.ones(2, 4).double()).sum().backward()


def _data(model):
    for p in model.parameters():
        p.data = p.data + 0.1


def _vector(model):
    vector_to_parameters(parameters_to_vector(model.parameters()).detach() * 1.1, model.parameters())


def _inplace(model):
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] += 1e-12


def _nan(model):
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan


STEPS = {"plain": _plain, "fused": _fused, "p.data": _data, "vector_to_parameters": _vector, "one bit": _inplace}


@pytest.mark.parametrize("step", STEPS)
def test_stale_after_every_kind_of_step_and_right_after_refresh(step, problem_of, dense_of):
    case = make("mlp")
    op = registry.build("hessian").lower(problem_of(case))
    v = torch.ones(op.shape[0]).double()
    op @ v
    STEPS[step](case.model)
    with pytest.raises(StaleError, match="refresh"):
        op @ v
    for p in case.model.parameters():
        p.grad = None
    from tests.support.dense import Dense

    expected = Dense(case).hessian @ v
    assert op.refresh() is op
    assert torch.allclose(op @ v, expected, atol=1e-12)


def test_stale_names_what_changed_buffers_and_flags_too(problem_of):
    case = make("batchnorm_eval")
    op = registry.build("ggn").lower(problem_of(case))
    v = np.ones(op.shape[0])
    case.model[1].running_mean += 1
    with pytest.raises(StaleError, match="running_mean"):
        op @ v
    op.refresh()
    case.model.train()
    with pytest.raises(StaleError, match="training flags"):
        op @ v
    case.model.eval()
    op @ v  # the state it was lowered at is back


def test_stale_sees_frozen_parameters_and_the_loss(problem_of):
    case = make("frozen_and_unused")
    case.loss = nn.CrossEntropyLoss(weight=torch.ones(3).double())
    op = registry.build("ggn").lower(problem_of(case))
    v = np.ones(op.shape[0])
    with torch.no_grad():
        case.model.frozen.weight.mul_(1.5)
    with pytest.raises(StaleError, match=r"frozen\.weight"):
        op @ v
    op.refresh() @ v
    case.loss.weight[0] = 3.0
    with pytest.raises(StaleError, match="loss"):
        op @ v
    op.refresh() @ v


def test_nan_parameters_are_equal_to_themselves_but_products_are_refused(problem_of):
    case = make("mlp")
    _nan(case.model)
    op = registry.build("ggn").lower(problem_of(case))
    with pytest.raises(ProblemError, match="NaN"):
        op @ np.ones(op.shape[0])


# -- nothing of the user's changes ----------------------------------------------------------------------------------------------


def _state(model):
    return {
        "parameters": [(n, id(p), type(p), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
        "buffers": [(n, id(b), b.clone()) for n, b in model.named_buffers(remove_duplicate=False)],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "flags": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "dicts": [sorted(vars(m)) for m in model.modules()],
        "slots": [(list(m._parameters), list(m._buffers), list(m._modules)) for m in model.modules()],
        "flat": [[id(w) for w in m._flat_weights] for m in model.modules() if isinstance(m, nn.RNNBase)],
        "random": (torch.get_rng_state(),),
    }  # fmt: skip


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


@pytest.mark.parametrize("model", ZOO)
def test_everything_of_the_users_is_bit_identical(model, problem_of):
    case = make(model)
    for i, p in enumerate(case.model.parameters()):
        if i % 2:
            p.grad = torch.full_like(p, i)
    before = _state(case.model)
    problem = problem_of(case)
    build = registry.build
    op = (
        build("hessian") + build("centered_covariance") + build("ggn_mc", samples=2)
        if model != "gaussian_nll" and model != "several_outputs"
        else build("hessian")
    ).lower(problem)
    op @ torch.ones(problem.size).double()
    (build("ggn") + build("covariance")).lower(problem) @ np.ones(problem.size)
    if model != "batchnorm_training":
        build("covariance_diagonal").lower(problem) @ np.ones(problem.size)
    problem.value(), problem.gradient(), op.explain()
    after = _state(case.model)
    for key, value in before.items():
        assert _same(value, after[key]), key


def test_a_failing_model_is_left_intact(problem_of):
    case = make("two_names")
    before = _state(case.model)
    problem = problem_of(case, (torch.ones(2, 9).double(), torch.tensor([0, 1])))
    with pytest.raises(ProblemError, match=r"failed on batch 0, a tuple\(tensor \(2, 9\)"):
        registry.build("hessian").lower(problem) @ np.ones(problem.size)
    for key, value in _state(case.model).items():
        assert _same(value, before[key]), key


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
@pytest.mark.parametrize("term", ["hessian", "ggn", "centered_covariance", "jacobian"])
def test_the_callers_context_does_not_matter(context, term, problem_of, vectors):
    op = registry.build(term).lower(problem_of("attention_fused"))
    V = vectors(op.shape[1])
    expected = op @ V
    with context():
        inside = registry.build(term).lower(problem_of("attention_fused")) @ vectors(op.shape[1])
        again = op @ V
    assert torch.allclose(inside, expected, rtol=1e-12, atol=1e-13)
    assert torch.allclose(again, expected, rtol=1e-12, atol=1e-13)


def test_a_model_and_data_made_under_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        data = (torch.ones(4, 3).double(), torch.tensor([0, 1, 1, 0]))
    problem = Problem(model, nn.CrossEntropyLoss(), data, params=["*"])
    op = registry.build("hessian").lower(problem)
    assert torch.isfinite(op @ torch.ones(problem.size).double()).all()


def test_process_wide_switches_are_put_back(problem_of):
    before = (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    )
    op = registry.build("hessian").lower(problem_of("attention_fused"))
    op @ np.ones(op.shape[0])
    assert before == (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    )


def test_threads(problem_of):
    op = registry.build("hessian").lower(problem_of("attention_fused"))
    v = np.ones(op.shape[0])
    expected, results = op @ v, []
    threads = [threading.Thread(target=lambda: results.append(op @ v)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 4
    assert all(np.array_equal(r, expected) for r in results)


# -- pickling ---------------------------------------------------------------------------------------------------------------------


def test_pickling_problems_and_operators(problem_of, tmp_path):
    op = (registry.build("hessian") + Identity).lower(problem_of("mlp"))
    v = np.ones(op.shape[0])
    expected = op @ v
    for twin in (pickle.loads(pickle.dumps(op)), copy.deepcopy(op), pickle.loads(pickle.dumps(op.problem))):
        twin = twin if isinstance(twin, CurvatureOperator) else op.expr.lower(twin)
        np.testing.assert_array_equal(twin @ v, expected)
    file = tmp_path / "op.pkl"
    torch.save(op, file)
    code = f"""
        import numpy as np, torch
        op = torch.load({str(file)!r}, weights_only=False)
        print(float((op @ np.ones(op.shape[0])).sum()))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(run.stdout) == pytest.approx(expected.sum(), rel=1e-12)


# -- parts ------------------------------------------------------------------------------------------------------------------------


def test_restrictions_and_blocks(dense_of, problem_of, vectors):
    dense, problem = dense_of("mlp"), problem_of("mlp")
    H, J = dense.hessian, dense.jacobian
    layout = problem.layout
    keep = list(range(25, dense.D))
    op = restrict(registry.build("hessian") + Identity, "2.*").lower(problem)
    assert torch.allclose(op.to_dense(), H[keep][:, keep] + torch.eye(len(keep)).double(), atol=1e-13)
    assert torch.allclose(restrict(registry.build("jacobian"), "2.*").lower(problem).to_dense(), J[:, keep], atol=1e-13)
    V = vectors(dense.D)
    expected = torch.zeros_like(H)
    for s in layout.slices.values():
        expected[s, s] = H[s, s]
    assert torch.allclose(block_diagonal(registry.build("hessian")).lower(problem) @ V, expected @ V, atol=1e-13)
    by_module = torch.block_diag(H[:25, :25], H[25:, 25:])
    assert torch.allclose(
        block_diagonal(registry.build("hessian"), by="module").lower(problem) @ V, by_module @ V, atol=1e-13
    )
    mixed = block_diagonal({"0.*": registry.build("ggn"), "2.bias": 3 * Identity}).lower(problem)
    zero = torch.zeros_like(H)
    zero[:25, :25] = dense.ggn[:25, :25]
    zero[-3:, -3:] = 3 * torch.eye(3)
    assert torch.allclose(mixed @ V, zero @ V, atol=1e-13)


def test_parts_that_do_not_fit(problem_of):
    problem = problem_of("mlp")
    with pytest.raises(ProblemError, match="did you mean"):
        restrict(registry.build("ggn"), "0.weigth").lower(problem)
    with pytest.raises(ExpressionError, match="overlap"):
        block_diagonal({"0.*": registry.build("ggn"), "*.bias": Identity}).lower(problem)


# -- messages ------------------------------------------------------------------------------------------------------------------------


def test_lowering_needs_a_problem_and_a_size(problem_of):
    with pytest.raises(ExpressionError, match=r"curvalg\.Problem"):
        registry.build("ggn").lower(nn.Linear(2, 2))
    problem = problem_of("mlp")
    assert (2 * Identity).lower(problem).shape == (problem.size, problem.size)
    with pytest.raises(ExpressionError, match="preconditioner"):
        registry.build("ggn").lower(problem, preconditioner=Identity)


def test_dense_checks_memory_first(problem_of, monkeypatch):
    op = registry.build("ggn").lower(problem_of("mlp"))
    monkeypatch.setattr("curvalg.lowering.composition.free_memory", lambda device: 1000)
    with pytest.raises(ProblemError, match="GiB"):
        op.to_dense()


def test_explain_says_what_happens(problem_of):
    build = registry.build
    op = (2 * build("hessian") + build("fisher") - build("centered_covariance").T + 1e-3 * Identity).lower(
        problem_of("mlp")
    )
    text = op.explain()
    for part in (
        "2*hessian + fisher - centered_covariance.T + 0.001*identity",
        "2*hessian + ggn - centered_covariance + 0.001*identity",
        "by Fisher of a natural likelihood",
        "by transpose of a symmetric matrix",
        "sweep: 2*hessian + ggn - centered_covariance",
        "recorded: one backward for the tangent, one for the product",
        "7 rows, N = 7 samples",
        "symmetric: yes",
    ):
        assert part in text, part


def test_replaced_parameters_and_modules_are_seen_and_taken_up(problem_of):
    from tests.support.dense import Dense

    case = make("mlp")
    op = registry.build("hessian").lower(problem_of(case))
    v = torch.ones(op.shape[0]).double()
    case.model[0].weight = nn.Parameter(case.model[0].weight.detach() * 1.5)
    with pytest.raises(StaleError, match=r"0\.weight"):
        op @ v
    assert torch.allclose(op.refresh() @ v, Dense(case).hessian @ v, atol=1e-12)
    case.model[2] = nn.Linear(5, 3).double()
    with pytest.raises(StaleError, match=r"2\.weight"):
        op @ v
    assert torch.allclose(op.refresh() @ v, Dense(case).hessian @ v, atol=1e-12)
    case.model[0] = nn.Linear(4, 5, bias=False).double()
    with pytest.raises(ProblemError, match="make a new Problem"):
        op.refresh()


def test_parts_of_what_is_not_local(dense_of, problem_of, vectors):
    """A sub-matrix of a product or an inverse is not the product or inverse of sub-matrices."""
    from curvalg import Diagonal
    from tests.support.third_party import GradientOuter

    dense, problem = dense_of("mlp"), problem_of("mlp")
    G, H, g = dense.ggn, dense.hessian, dense.gradient
    ggn, hessian = registry.build("ggn"), registry.build("hessian")
    A = torch.linalg.inv(G + torch.eye(dense.D))
    outer = torch.outer(g, g) / g.norm() ** 2
    values = torch.linspace(1, 2, dense.D).double()
    damped = torch.linalg.inv(outer + torch.eye(dense.D))
    V = vectors(dense.D)
    for expr, whole in (
        (ggn @ hessian, G @ H),
        (inverse(ggn + Identity), A),
        (inverse(ggn + Identity) @ hessian, A @ H),
        (Diagonal(values), torch.diag(values)),
        (GradientOuter(), outer),
        (GradientOuter() @ ggn, outer @ G),
        (inverse(GradientOuter() + Identity), damped),
        (ggn + GradientOuter() - 2 * Identity, G + outer - 2 * torch.eye(dense.D)),
    ):
        keep = list(range(25, dense.D))
        got = restrict(expr, "2.*").lower(problem)
        part = whole[keep][:, keep]
        if expr == GradientOuter() or "ggn + gradient_outer" in str(expr):
            # A matrix term sees the restricted problem: its gradient's norm is that of the kept part.
            scale = g.norm() ** 2 / g[keep].norm() ** 2
            part = part + (scale - 1) * outer[keep][:, keep]
        assert torch.allclose(got.to_dense(), part, atol=1e-9), str(expr)
        if "gradient_outer" not in str(expr):
            blocks = torch.block_diag(whole[:25, :25], whole[25:, 25:])
            assert torch.allclose(block_diagonal(expr, by="module").lower(problem) @ V, blocks @ V, atol=1e-9), str(
                expr
            )


@pytest.mark.parametrize("expr", ["restricted", "blocks"])
def test_refresh_takes_up_replaced_parameters_in_parts(expr, problem_of):
    from tests.support.dense import Dense

    case = make("mlp")
    hessian = registry.build("hessian")
    op = (restrict(hessian, "0.*") if expr == "restricted" else block_diagonal(hessian, by="module")).lower(
        problem_of(case)
    )
    op.to_dense()
    case.model.load_state_dict({k: 1.3 * v for k, v in case.model.state_dict().items()}, assign=True)
    H = Dense(case).hessian
    expected = H[:25, :25] if expr == "restricted" else torch.block_diag(H[:25, :25], H[25:, 25:])
    assert torch.allclose(op.refresh().to_dense(), expected, atol=1e-12)


def test_a_stale_operand_on_either_side_is_refused(problem_of):
    case = make("mlp")
    problem = problem_of(case)
    old = registry.build("ggn").lower(problem)
    with torch.no_grad():
        case.model[0].weight.add_(1.0)
    new = registry.build("hessian").lower(problem)
    for combine in (lambda: old + new, lambda: new + old, lambda: new @ old, lambda: new - old):
        with pytest.raises(StaleError):
            combine()


def test_operators_and_numbers(problem_of, vectors):
    op = registry.build("ggn").lower(problem_of("mlp"))
    v = vectors(op.shape[0], 1)[:, 0]
    assert torch.allclose((op * torch.tensor(2.0)) @ v, 2 * (op @ v))
    assert torch.allclose((torch.tensor(2.0) * op) @ v, 2 * (op @ v))
    for wrong, message in (
        (lambda: op + 0.1, "ambiguous"),
        (lambda: op / op, "inverse"),
        (lambda: op - 1, "ambiguous"),
    ):
        with pytest.raises(ExpressionError, match=message):
            wrong()


def test_preconditioners_in_the_algebra_of_operators(problem_of, vectors):
    problem = problem_of("mlp")
    calls = [0]

    def P(v):
        calls[0] += 1
        return v

    solve = inverse(registry.build("ggn") + 0.1 * Identity, solver="cg")
    inv, h = solve.lower(problem, preconditioner=P), registry.build("hessian").lower(problem)
    v = vectors(problem.size, 1)[:, 0]
    for op in (h + inv, inv + h, h @ inv):
        before = calls[0]
        op @ v
        assert calls[0] > before
    assert (inv - inv).shape == inv.shape
    with pytest.raises(ExpressionError, match="different preconditioners"):
        inv + solve.lower(problem)
    with pytest.raises(ExpressionError, match="a preconditioner is"):
        solve.lower(problem, preconditioner=3)
    assert "not needed" in inverse(registry.build("ggn") + Identity).lower(problem, preconditioner=P).explain()
