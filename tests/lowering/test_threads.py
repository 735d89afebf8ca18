"""Several threads may lower and multiply on one problem; what they share is made and multiplied by one at a time."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from curvalg import Identity, Problem, block_diagonal, inverse, registry
from curvalg.estimate import trace

B = registry.build
EXPRESSIONS = {
    "hessian": lambda: B("hessian"),
    "ggn": lambda: B("ggn"),
    "covariance": lambda: B("covariance"),
    "centred": lambda: B("centered_covariance"),
    "sum": lambda: B("hessian") - 2 * B("covariance"),
    "gram": lambda: inverse(B("ggn") + Identity),
    "cg": lambda: inverse(B("ggn") + Identity, solver="cg"),
    "kfac": lambda: inverse(B("kfac") + Identity),
    "blocks": lambda: block_diagonal(B("ggn")),
    "two stages": lambda: B("ggn_class"),
}


@pytest.fixture
def busy():
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def problem(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = [(torch.randn(2, 3).double(), torch.randint(0, 3, (2,))) for _ in range(4)]
    return Problem(model, nn.CrossEntropyLoss(), data, **options)


@pytest.mark.parametrize("options", [{}, {"cache": 0}, {"cache": 20_000}], ids=str)
def test_threads_on_one_problem_give_the_numbers_of_one(busy, options):
    names = list(EXPRESSIONS)
    shared = problem(**options)
    v = torch.randn(shared.size, generator=torch.Generator().manual_seed(1)).double()
    expected = {name: EXPRESSIONS[name]().lower(problem()) @ v for name in names}

    def work(k):
        name = names[k % len(names)]
        op = EXPRESSIONS[name]().lower(shared)
        return name, [op @ v for _ in range(2)]

    with ThreadPoolExecutor(4) as pool:
        for name, products in pool.map(work, range(2 * len(names))):
            for got in products:
                assert torch.allclose(got, expected[name], rtol=1e-7, atol=1e-9), name


def test_solves_estimates_and_gradients_side_by_side(busy):
    shared = problem()
    v = torch.ones(shared.size).double()
    solver = inverse(B("ggn") + Identity, solver="cg").lower(shared)
    jobs = [
        lambda: solver.solve(v).x,
        shared.gradient,
        lambda: torch.tensor(shared.value()),
        lambda: torch.tensor(trace(B("hessian").lower(shared), products=12).value),
        lambda: torch.tensor(B("kfac").lower(shared).exact("trace")),
    ]
    expected = [job() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for k, got in enumerate(pool.map(lambda k: jobs[k % len(jobs)](), range(20))):
            assert torch.allclose(torch.as_tensor(got).double(), expected[k % len(jobs)].double(), rtol=1e-7), k


def test_threads_on_problems_of_their_own_leave_the_random_state_alone(busy):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)

    def problem_of_own():
        generator = torch.Generator().manual_seed(0)
        model = nn.Linear(3, 3).double().requires_grad_()
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator).double()
        return Problem(model, nn.MSELoss(), (torch.ones(4, 3).double(), torch.ones(4, 3).double()))

    models = [problem_of_own() for _ in range(4)]  # constructing layers draws
    torch.manual_seed(3)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda p: B("ggn").lower(p) @ torch.ones(p.size).double(), models))
    assert all(torch.equal(results[0], r) for r in results)
    assert torch.equal(torch.rand(3), expected)


def test_a_problem_is_made_while_another_one_calls_the_same_model():
    """During a call other tensors stand in the user's module; they must not be taken for its parameters."""
    inside, made = threading.Event(), threading.Event()

    class Waiting(nn.Linear):
        def forward(self, x):
            if not inside.is_set():
                inside.set()
                made.wait(0.5)  # nobody can make a problem now; who could would take wrong tensors
            return super().forward(x)

    model, X, Y = Waiting(3, 2).double(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    v = torch.ones(8).double()
    expected = registry.build("ggn").lower(Problem(copy.deepcopy(model), nn.MSELoss(), (X, Y), verify=False)) @ v
    inside.clear()

    def first():
        return registry.build("ggn").lower(Problem(model, nn.MSELoss(), (X, Y))) @ v

    def second():
        inside.wait()
        problem = Problem(model, nn.MSELoss(), (X, Y))
        made.set()
        chosen = list(problem.model.chosen.values())
        return chosen, registry.build("ggn").lower(problem) @ v

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(first), pool.submit(second)
        chosen, product = other.result()
        assert all(p is q for p, q in zip(chosen, (model.weight, model.bias), strict=True))
        assert torch.allclose(one.result(), expected, rtol=1e-12)
        assert torch.allclose(product, expected, rtol=1e-12)
