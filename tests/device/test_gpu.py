"""On a GPU: every matrix, in every mode, gives the numbers of the CPU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from curvalg import CurvalgError, Problem, registry
from tests.support.devices import SIMULATED, agree, both, moved
from tests.support.zoo import ZOO, make

TERMS = [name for name in registry.names() if name not in ("empirical_fisher", "hessian_fd")]
"""Each matrix once; differences of gradients are right to a tolerance of their own."""
MODES = {"kept": {}, "fresh": {"cache": 0}, "factored": {"factored": True}}


DIFFERENT = ("linear", "mlp", "tied_embedding", "reused_weight")
"""Small models that differ in their layers, outputs or use of parameters."""
BASIC = ("hessian", "ggn", "covariance", "residual", "jacobian", "kfac")
"""Terms of every kind of route."""


def terms_of(case, mode):
    """All terms on a real GPU; on the simulated one, which is slow, each is taken in one mode of every second case, all modes
    in turn."""
    if not SIMULATED:
        return TERMS
    terms, cases = (TERMS, DIFFERENT) if case in DIFFERENT else (BASIC, [name for name in ZOO if name not in DIFFERENT])
    turns = enumerate(terms, cases.index(case))
    return [term for turn, term in turns if turn % 2 == 0 and turn // 2 % len(MODES) == list(MODES).index(mode)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ZOO)
def test_products_are_those_of_the_cpu(name, mode):
    cpu, gpu = both(name, **MODES[mode])
    for term in terms_of(name, mode):
        try:
            expected = registry.build(term).lower(cpu)
            V = torch.randn(expected.shape[1], 2, generator=torch.Generator().manual_seed(0)).double()
            want = expected @ V
        except CurvalgError as error:  # the same is refused
            with pytest.raises(type(error)):
                registry.build(term).lower(gpu) @ V.cuda()
            continue
        op = registry.build(term).lower(gpu)
        given = [(V, want)] if SIMULATED and mode != "kept" else [(V[:, 0], want[:, 0]), (V, want)]
        for x, right in given:
            got = op @ x.cuda()
            assert got.is_cuda
            agree(right, got)


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


@pytest.mark.parametrize("tf32", [False, True])
def test_single_precision_with_and_without_tf32(tf32):
    case = make("mlp")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        single = lambda t: t.float() if t.is_floating_point() else t
        batches = moved([tuple(single(t) for t in batch) for batch in case.batches])
        problem = Problem(copy.deepcopy(case.model).float().cuda(), case.loss, batches)
        expected = Problem(case.model, case.loss, case.batches)
        v = torch.ones(expected.size).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for term in ("hessian", "ggn", "covariance", "kfac"):
                got, want = (registry.build(term).lower(p) @ w for p, w in ((problem, v.float().cuda()), (expected, v)))
                assert (got.cpu().double() - want).norm() <= (2e-2 if tf32 else 1e-4) * want.norm()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
