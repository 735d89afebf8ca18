"""Inputs without targets: enough where there is no loss, or one of the output alone; otherwise refused with what to pass."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvalg import LossError, Problem, ProblemError, registry
from curvalg.losses import CallableLoss

N, C = 7, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, C)).double()


def mean_square(output):
    return output.square().sum(1).mean()


def total_quartic(output):
    return output.pow(4).sum()


class Energy(nn.Module):
    """A loss with a parameter, of the output alone."""

    def __init__(self, scale=0.5):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, output):
        return (self.scale * output.square()).sum(1).mean() + output.sin().sum(1).mean()


X = random(N, 2)
ALONE = {
    "a tensor": lambda: X,
    "a tuple of one": lambda: (X,),
    "a list of tensors": lambda: [X[:3], X[3:]],
    "a loader of tensors": lambda: DataLoader(X, batch_size=3),
    "a loader of a data set": lambda: DataLoader(TensorDataset(X), batch_size=3),
    "mappings": lambda: [{"input": X[:3]}, {"input": X[3:]}],
    "pairs": lambda: [(X[:3], random(3, C)), (X[3:], torch.full((N - 3, C), torch.nan))],
}
LOSSES = {"mean": mean_square, "sum": total_quartic, "module": Energy(), "loss": CallableLoss(mean_square)}


def jacobian(model):
    theta = {name: p.detach() for name, p in model.named_parameters()}
    parts = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (X,)).reshape(-1))(theta)
    return torch.cat([part.reshape(N * C, -1) for part in parts.values()], 1)


def hessian(model, loss):
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def value(theta):
        parts = theta.split([shape.numel() for shape in shapes])
        tree = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return loss(torch.func.functional_call(model, tree, (X,)))

    return torch.func.hessian(value)(flat)


@pytest.mark.parametrize("data", ALONE)
def test_what_needs_no_loss(data):
    model = network()
    problem = Problem(model, None, ALONE[data]())
    J = jacobian(model)
    torch.testing.assert_close(registry.build("jacobian").lower(problem).to_dense(), J)
    torch.testing.assert_close(registry.build("ntk").lower(problem).to_dense(), J @ J.T)
    assert problem.num_samples == N


@pytest.mark.parametrize("data", ALONE)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_the_output_alone(name, data):
    model, loss = network(), LOSSES[name]
    problem = Problem(model, loss, ALONE[data]())
    fn = loss.fn.fn if isinstance(loss, CallableLoss) else loss
    assert problem.value() == pytest.approx(fn(model(X)).item())
    torch.testing.assert_close(registry.build("hessian").lower(problem).to_dense(), hessian(model, fn))
    B = torch.func.hessian(lambda z: fn(z.reshape(N, C)))(model(X).detach().reshape(-1))
    J = jacobian(model)
    torch.testing.assert_close(registry.build("ggn").lower(problem).to_dense(), J.T @ B @ J)
    rows = problem.per_sample_gradients()
    scale = 1 if name == "sum" else N
    torch.testing.assert_close(rows.sum(0) / scale, problem.gradient())


def test_targets_that_such_a_loss_is_given_do_not_count():
    model = network()
    one, other = (Problem(model, mean_square, (X, random(N, seed=seed))) for seed in (1, 2))
    assert one.value() == other.value()
    with pytest.raises(ProblemError, match="takes the output alone; leave it out"):
        Problem(model, mean_square, (X, X), target=lambda batch: batch[1])


def test_its_tensors_are_watched():
    model, loss = network(), Energy()
    problem = Problem(model, loss, X)
    before = problem.value()
    with torch.no_grad():
        loss.scale.add_(1)
    assert problem.value() == pytest.approx(loss(model(X)).item())
    assert problem.value() != before
    assert set(CallableLoss(loss).tensors()) == {"scale"}


def test_other_data_and_pickles_are_read_the_same_way():
    model = network()
    problem = Problem(model, mean_square, X)
    other = random(4, 2, seed=5)
    assert problem.with_data(other).value() == pytest.approx(mean_square(model(other)).item())
    copied = pickle.loads(pickle.dumps(problem))
    assert copied.value() == problem.value() == copy.copy(problem).value()


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), nn.CrossEntropyLoss(), nn.functional.mse_loss, lambda z, y: (z - y).sum()]
)
def test_a_loss_with_targets_is_refused_with_what_to_pass(loss):
    model = network()
    message = r"inputs alone, a tensor.*pass \(X, y\).*loss=None"
    with pytest.raises(ProblemError, match=message):
        Problem(model, loss, X)
    for data in ("a tuple of one", "a loader of tensors", "a loader of a data set"):
        with pytest.raises(ProblemError, match=message):
            Problem(model, loss, ALONE[data]()).value()


def test_targets_that_a_matrix_does_not_depend_on_may_be_any():
    """What the message says of the ggn."""
    model = network()
    pairs = [(X, torch.zeros_like(model(X))), (X, random(N, C, seed=3))]
    one, other = (registry.build("ggn").lower(Problem(model, nn.MSELoss(), pair)).to_dense() for pair in pairs)
    torch.testing.assert_close(one, other)
    pairs = [(X, torch.zeros(N, dtype=torch.long)), (X, torch.arange(N) % C)]
    one, other = (registry.build("ggn").lower(Problem(model, nn.CrossEntropyLoss(), pair)).to_dense() for pair in pairs)
    torch.testing.assert_close(one, other)


def test_what_needs_a_loss_is_refused_without_one():
    with pytest.raises(LossError, match="loss=None"):
        registry.build("ggn").lower(Problem(network(), None, X))


def test_a_function_of_one_or_two_arguments_has_targets():
    def either(output, target=None):
        return output.square().sum() if target is None else (output - target).square().sum()

    y = random(N, C)
    model = network()
    assert Problem(model, either, (X, y), reduction="sum").value() == pytest.approx(either(model(X), y).item())
    with pytest.raises(ProblemError, match="inputs alone"):
        Problem(model, either, X)
