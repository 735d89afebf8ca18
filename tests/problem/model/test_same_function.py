"""Problems whose models have the same parameters but compute other functions are told apart, where two problems are taken."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

from curvalg import CurvalgWarning, Identity, Problem, ProblemError, estimate, inverse, registry
from curvalg_plugins.ntk import cross_kernel
from curvalg_plugins.projections import trak_scores

X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2


class Scaled(nn.Module):
    """A network with a number, a buffer, a frozen parameter and a function of its own."""

    def __init__(self, activation=torch.tanh, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)
        self.activation, self.factor = activation, factor
        self.register_buffer("shift", torch.zeros(4))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        return self.outer(self.dropout(self.activation(self.inner(x)) * self.factor * self.frozen + self.shift))


def changed(change):
    other = Scaled()
    change(other)
    return other


def closed_over(activation):
    class Net(Scaled):
        def forward(self, x):
            return self.outer(activation(self.inner(x)))

    return Net()


def first(params, x):
    return torch.tanh(x @ params["w"])


def second(params, x):
    return torch.relu(x @ params["w"])


def third(params, x):
    return torch.tanh(x @ params["w"])


def sequential(activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2))


OTHERS = {
    "another module": (sequential(nn.Tanh()), sequential(nn.ReLU()), "the model.1 is a Tanh in one and a ReLU"),
    "another option": (
        sequential(nn.LeakyReLU(0.1)),
        sequential(nn.LeakyReLU(0.2)),
        "the model.1.negative_slope is 0.1",
    ),
    "another number": (Scaled(), Scaled(factor=2.0), "the model.factor is 1.0 in one and 2.0"),
    "another function": (Scaled(), Scaled(torch.relu), "the model.activation is tanh in one and relu"),
    "another buffer": (Scaled(), changed(lambda m: m.shift.add_(1)), "the values of 'shift' differ"),
    "another frozen parameter": (Scaled(), changed(lambda m: m.frozen.data.add_(1)), "the values of 'frozen' differ"),
    "another mode": (Scaled(), changed(lambda m: m.dropout.eval()), "the model.dropout is in training mode in one"),
    "a hook": (
        Scaled(),
        changed(lambda m: m.inner.register_forward_hook(lambda *_: None)),
        "forward_hooks has 0 entries",
    ),
    "a closed-over function": (closed_over(torch.tanh), closed_over(torch.relu), "activation of the model.forward"),
    "another partial": (
        Scaled(functools.partial(nn.functional.elu, alpha=1.0)),
        Scaled(functools.partial(nn.functional.elu, alpha=2.0)),
        "'alpha'",
    ),
}
"""Two modules of the same parameters, and what the message says."""
USES = {
    "influence": lambda p, q: estimate.influence(inverse(registry.build("ggn") + 0.1 * Identity).lower(p), q).scores,
    "influence_stream": lambda p, q: list(
        estimate.influence_stream(inverse(registry.build("ggn") + 0.1 * Identity).lower(p), q)
    ),
    "functional_variance": lambda p, q: estimate.functional_variance(
        inverse(registry.build("ggn") + 0.1 * Identity).lower(p), q
    ),
    "trak_scores": lambda p, q: trak_scores(p, q, 3, damping=0.1),
    "cross_kernel": cross_kernel,
}


def problem_of(model, **options):
    return Problem(model, nn.CrossEntropyLoss(), (X, Y), **options)


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_is_named(name):
    one, other, message = OTHERS[name]
    with pytest.raises(ProblemError, match=message) as caught:
        problem_of(one, randomness="frozen").require_same_function(problem_of(other, randomness="frozen"), "queries")
    assert "with_data" in str(caught.value)


@pytest.mark.parametrize("use", USES)
def test_every_use_of_two_problems_asks(use):
    one, other, _ = OTHERS["another module"]
    with pytest.raises(
        ProblemError, match=f"{use.removesuffix('_stream')}: .* is a (Tanh|ReLU) in one and a (Tanh|ReLU)"
    ):
        USES[use](problem_of(one), problem_of(other))


@pytest.mark.parametrize("use", USES)
def test_copies_and_other_data_are_the_same_function(use):
    net = Scaled().eval()
    problem = problem_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = USES[use](problem, problem.with_data((X, Y)))
        found = USES[use](problem, problem_of(copy.deepcopy(net)))
        again = USES[use](problem, problem_of(Scaled().eval()))
    if isinstance(own, torch.Tensor):
        torch.testing.assert_close(found, own, rtol=0, atol=0)
        torch.testing.assert_close(again, own, rtol=0, atol=0)


def test_classes_and_functions_that_were_made_twice():
    problem_of(closed_over(torch.tanh).eval()).require_same_function(
        problem_of(closed_over(torch.tanh).eval()), "queries"
    )
    w = {"w": torch.randn(3, 2, requires_grad=True)}
    one, other, same = (Problem(f, nn.CrossEntropyLoss(), (X, Y), params=w) for f in (first, second, third))
    one.require_same_function(same, "queries")
    with pytest.raises(ProblemError, match="the code of the model differs"):
        one.require_same_function(other, "queries")


def test_other_tensors_of_one_function_are_compared():
    def function(params, x):
        return x @ params["w"] + params["b"]

    w = torch.randn(3, 2, requires_grad=True)
    one, other = (
        Problem(function, nn.CrossEntropyLoss(), (X, Y), params={"w": w, "b": torch.full((2,), b, requires_grad=True)})
        for b in (0.0, 1.0)
    )
    with pytest.raises(ProblemError, match="the values of 'b' differ"):
        one.require_same_function(other, "queries")


class Opaque:
    """An object that says nothing of itself."""

    __slots__ = ("value",)

    def __call__(self, x):
        return x


def test_what_cannot_be_compared_is_warned_of():
    with pytest.warns(CurvalgWarning, match="the model.activation, an object of the class Opaque"):
        problem_of(Scaled(Opaque()).eval()).require_same_function(problem_of(Scaled(Opaque()).eval()), "queries")


def test_loops_of_references_end():
    def looped():
        net = Scaled().eval()
        net.parts = {"net": [net]}
        net.parts["self"] = net.parts
        return net

    problem_of(looped()).require_same_function(problem_of(looped()), "queries")


def test_how_batches_are_handed_over_may_differ():
    net = Scaled().eval()
    other = Problem(
        net, nn.CrossEntropyLoss(), [{"x": X, "y": Y}], forward=lambda m, b: m(b["x"]), target=lambda b: b["y"]
    )
    problem = problem_of(net)
    torch.testing.assert_close(USES["influence"](problem, other), USES["influence"](problem, problem))
