"""On a GPU: every matrix, route and check gives the numbers of the CPU. Skipped where there is none."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch

from curvalg import CurvalgError, Identity, Problem, inverse, registry
from curvalg.estimate import eigsh, trace
from curvalg.tensors import trees
from tests.support.zoo import ZOO, make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU, and none is simulated")
SIMULATED = "tests.support.simulated_gpu" in sys.modules
TERMS = [name for name in registry.names() if name != "empirical_fisher"]
MODES = {"kept": {}, "fresh": {"cache": 0}, "factored": {"factored": True}}


def both(name, **options):
    """The problem of a case on the CPU, and the same on the GPU."""
    if SIMULATED and name in ("lstm", "gru"):
        pytest.skip("the simulated GPU has no recurrent kernels")
    case = make(name)
    options = {**case.options, **options}
    cpu = Problem(case.model, case.loss, case.batches, **options)
    move = lambda tree: trees.tensor_map(lambda t: t.cuda(), tree)
    loss = copy.deepcopy(case.loss).cuda() if isinstance(case.loss, torch.nn.Module) else case.loss
    return cpu, Problem(copy.deepcopy(case.model).cuda(), loss, [move(batch) for batch in case.batches], **options)


def agree(cpu, gpu):
    assert gpu.is_cuda
    assert torch.allclose(gpu.cpu(), cpu, rtol=1e-8, atol=1e-9 * float(cpu.abs().max().clamp_min(1)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ZOO)
def test_products_are_those_of_the_cpu(name, mode):
    cpu, gpu = both(name, **MODES[mode])
    for term in TERMS:
        try:
            expected = registry.build(term).lower(cpu)
            V = torch.randn(expected.shape[1], 3, generator=torch.Generator().manual_seed(0)).double()
            want = [expected @ V[:, 0], expected @ V]
        except CurvalgError as error:  # the same is refused
            with pytest.raises(type(error)):
                registry.build(term).lower(gpu) @ V.cuda()
            continue
        op = registry.build(term).lower(gpu)
        agree(want[0], op @ V[:, 0].cuda())
        agree(want[1], op @ V.cuda())


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_inverses_and_estimates(name):
    cpu, gpu = both(name)
    v = torch.ones(cpu.size).double()
    for expr in (registry.build("ggn") + Identity, registry.build("kfac") + Identity):
        agree(inverse(expr).lower(cpu) @ v, inverse(expr).lower(gpu) @ v.cuda())
    assert trace(registry.build("ggn").lower(gpu)).value == pytest.approx(
        trace(registry.build("ggn").lower(cpu)).value, rel=1e-9
    )
    values = [eigsh(registry.build("hessian").lower(p), 2).eigenvalues for p in (cpu, gpu)]
    assert torch.allclose(values[0], values[1].cpu(), rtol=1e-4)


def test_random_numbers_of_a_generator_on_the_device_are_refused():
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.generator = torch.nn.Linear(3, 2), torch.Generator("cuda")

        def forward(self, x):
            return self.layer(x) * torch.rand(len(x), 1, device="cuda", generator=self.generator)

    problem = Problem(Noisy().cuda(), torch.nn.MSELoss(), (torch.randn(4, 3).cuda(), torch.randn(4, 2).cuda()))
    with pytest.raises(CurvalgError, match="random"):
        registry.build("ggn").lower(problem) @ torch.ones(8).cuda()


def test_a_moved_model_is_told():
    cpu, _ = both("mlp")
    op = registry.build("ggn").lower(cpu)
    cpu.model.module.cuda()
    with pytest.raises(CurvalgError):
        op @ torch.ones(cpu.size).double()
    assert op.refresh().device.type == "cuda"


@pytest.mark.parametrize("tf32", [False, True])
def test_single_precision_with_and_without_tf32(tf32):
    case = make("mlp")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        to = lambda tree: trees.tensor_map(lambda t: (t.float() if t.is_floating_point() else t).cuda(), tree)
        problem = Problem(copy.deepcopy(case.model).float().cuda(), case.loss, [to(b) for b in case.batches])
        expected = Problem(case.model, case.loss, case.batches)
        v = torch.ones(expected.size).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for term in ("hessian", "ggn", "covariance", "kfac"):
                got, want = (registry.build(term).lower(p) @ w for p, w in ((problem, v.float().cuda()), (expected, v)))
                assert (got.cpu().double() - want).norm() <= (2e-2 if tf32 else 1e-4) * want.norm()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
