"""What belongs to the user is left as it was: models, contexts, switches; and pickles carry it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from torch import nn

from curvalg import (
    CurvatureOperator,
    Identity,
    Problem,
    ProblemError,
    registry,
)
from tests.support.zoo import ZOO, make

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
