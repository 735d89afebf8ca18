"""A model that lies on two devices, with the chosen parameters on one of them: the numbers are those on the CPU."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from curvalg import CurvalgError, Identity, Problem, inverse, registry
from curvalg.estimate import eigsh, trace
from tests.support.devices import agree, in_turn

BUILD = registry.build
PLACES = [("cpu", "cuda"), ("cuda", "cpu")]
TERMS = [name for name in registry.names() if name != "empirical_fisher"]
COMBINATIONS = [(places, chosen) for places in PLACES for chosen in ("first", "second")]
"""(where the layers are, which one is chosen)."""


class Split(nn.Module):
    """Two layers, each on a device of its own."""

    def __init__(self, first, second):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4).double().to(first), nn.Linear(4, 3).double().to(second)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).to(self.second.weight.device))


def data():
    generator = torch.Generator().manual_seed(1)
    X, y = torch.randn(5, 4, generator=generator).double(), torch.randint(0, 3, (5,), generator=generator)
    return [(X[:2], y[:2]), (X[2:], y[2:])]


def problem_on(places, chosen, loss=None, **options):
    return Problem(Split(*places), loss or nn.CrossEntropyLoss(), data(), params=[f"{chosen}.*"], **options)


def product(expr, problem):
    op = expr.lower(problem)
    x = torch.linspace(-1, 1, op.shape[1], dtype=torch.float64, device=problem.device)
    results = [op @ x, op @ torch.stack([x, x + 1], 1)]
    assert all(result.device == problem.device for result in results)
    return torch.cat([result.reshape(len(results[0]), -1) for result in results], 1).cpu()


@functools.cache
def wanted(term, chosen):
    return product(BUILD(term), problem_on(("cpu", "cpu"), chosen))


@pytest.mark.parametrize(
    ("term", "combination"), dict.fromkeys([*in_turn(TERMS, COMBINATIONS), *(("hessian", c) for c in COMBINATIONS)])
)
def test_terms(term, combination):
    places, chosen = combination
    agree(wanted(term, chosen), product(BUILD(term), problem_on(places, chosen)))


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("chosen", ["first", "second"])
def test_value_gradient_inverse_and_estimates(places, chosen):
    whole, split = problem_on(("cpu", "cpu"), chosen), problem_on(places, chosen)
    assert split.value() == pytest.approx(whole.value(), rel=1e-12)
    agree(whole.gradient(), split.gradient())
    for expr in (inverse(BUILD("kfac") + Identity), inverse(BUILD("ggn") + Identity, solver="gram")):
        agree(product(expr, whole), product(expr, split))
    for compute in (
        lambda p: trace(BUILD("hessian").lower(p)).value,
        lambda p: eigsh(BUILD("ggn").lower(p), 2).eigenvalues,
    ):
        agree(compute(whole), compute(split), 1e-7)


@pytest.mark.parametrize("places", PLACES)
def test_a_loss_that_is_a_function(places):
    loss = lambda z, y: nn.functional.cross_entropy(z, y, label_smoothing=0.1)
    whole, split = (problem_on(p, "first", loss) for p in (("cpu", "cpu"), places))
    agree(product(BUILD("hessian"), whole), product(BUILD("hessian"), split))


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("chosen", ["first", "second"])
def test_outputs_that_are_made_in_chunks(places, chosen):
    whole, split = (problem_on(p, chosen, output_memory=0) for p in (("cpu", "cpu"), places))
    agree(product(BUILD("ggn"), whole), product(BUILD("ggn"), split))


def test_parameters_of_two_devices_are_refused_by_name():
    with pytest.raises(CurvalgError, match=r"several devices: cpu has first\.weight.*cuda:0 has second.*params="):
        Problem(Split("cpu", "cuda"), nn.CrossEntropyLoss(), data())
