"""Checkpoints of other models, losses and data are refused: told by numbers, where names and parameters are the same."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvalg import CheckpointError, Identity, Problem, inverse, registry
from curvalg.estimate import trace


def features(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(24, 4, generator=generator, dtype=dtype)
    return X, torch.randint(0, 3, (24,), generator=generator)


def network(activation=nn.Tanh, last=1.0, dtype=torch.float64):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        model[2].weight *= last
    return model


class Scaled(nn.Module):
    """A model with an attribute that is neither a parameter nor a buffer."""

    def __init__(self, factor):
        super().__init__()
        self.inner, self.factor = network(), factor

    def forward(self, x):
        return self.factor * self.inner(x)


def loader(batch_size=8, shift=0.0, roll=0, shuffle=False):
    X, y = features()
    return DataLoader(TensorDataset(X + shift, y.roll(roll)), batch_size=batch_size, shuffle=shuffle)


def squares(factor):
    """Zero, with a gradient of zero, where the outputs are the targets."""

    def loss(z, y):
        return factor * (z - y).square().sum()

    return loss


def interpolated(factor):
    model, (X, _) = network(), features()
    return Problem(model, squares(factor), (X, model(X).detach()), reduction="sum")


OUTPUTS, DERIVATIVE = "outputs of the model differs", "derivative of the model differs"
LOSS, DATA = "value and derivatives of the loss differs", "contents of the data differs"
ce = nn.CrossEntropyLoss
OTHERS = {
    "activation": (
        lambda: Problem(network(), ce(), features()),
        lambda: Problem(network(nn.ReLU), ce(), features()),
        OUTPUTS,
    ),
    "attribute": (
        lambda: Problem(Scaled(1.0), ce(), features()),
        lambda: Problem(Scaled(2.0), ce(), features()),
        OUTPUTS,
    ),
    "adapter": (
        lambda: Problem(network(), ce(), features()),
        lambda: Problem(network(), ce(), features(), forward=lambda model, batch: 2 * model(batch[0])),
        OUTPUTS,
    ),
    "without a loss": (
        lambda: Problem(network(), None, features()),
        lambda: Problem(network(nn.ReLU), None, features()),
        OUTPUTS,
    ),
    # Outputs of zero whatever comes before, and so a loss that is the same.
    "derivative": (
        lambda: Problem(network(last=0.0), ce(), features()),
        lambda: Problem(network(nn.ReLU, last=0.0), ce(), features()),
        DERIVATIVE,
    ),
    "label smoothing": (
        lambda: Problem(network(), ce(), features()),
        lambda: Problem(network(), ce(label_smoothing=0.1), features()),
        LOSS,
    ),
    "second derivative of the loss": (lambda: interpolated(1.0), lambda: interpolated(2.0), LOSS),
    "target": (
        lambda: Problem(network(), ce(), features()),
        lambda: Problem(network(), ce(), features(), target=lambda batch: 2 - batch[1]),
        LOSS,
    ),
    "data of a loader": (
        lambda: Problem(network(), ce(), loader()),
        lambda: Problem(network(), ce(), loader(shift=0.1)),
        DATA,
    ),
    "targets of a loader": (
        lambda: Problem(network(), ce(), loader()),
        lambda: Problem(network(), ce(), loader(roll=1)),
        DATA,
    ),
}


def run(problem, path):
    expr = registry.build("ggn" if problem.loss is not None else "jacobian")
    expr = expr if problem.loss is not None else expr.T @ expr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trace(expr.lower(problem), products=6, method="hutchinson", checkpoint=path)


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_loss_or_data_are_refused(name, tmp_path):
    first, second, message = OTHERS[name]
    path = tmp_path / "run.safetensors"
    value = run(first(), path).value
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"{message}.*name another file, or delete this one"):
        run(second(), path)
    assert path.read_bytes() == before and run(first(), path).value == value


def test_a_solve_with_another_loss_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"

    def solve(loss):
        op = inverse(registry.build("ggn") + Identity, solver="cg").lower(Problem(network(), loss, features()))
        return op.solve(torch.ones(op.shape[0], dtype=torch.float64), checkpoint=path)

    x = solve(ce()).x
    with pytest.raises(CheckpointError, match=LOSS):
        solve(ce(label_smoothing=0.9))
    assert torch.equal(solve(ce()).x, x)


@pytest.mark.parametrize("other", [{"batch_size": 5}, {"shuffle": True}])
def test_other_batches_of_the_same_data_are_the_same_run(other, tmp_path):
    path = tmp_path / "run.safetensors"
    first = run(Problem(network(), ce(), loader()), path)
    assert run(Problem(network(), ce(), loader(**other)), path).value == first.value


def test_rounding_is_no_difference(tmp_path):
    """As of another number of threads, or another machine."""
    path = tmp_path / "run.safetensors"

    class Reordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(dtype=torch.float32)

        def forward(self, x):
            return self.inner(x.flip(1).flip(1)) * 3 / 3

    X, y = features(torch.float32)
    model = Reordered()
    first = run(Problem(model, ce(), (X, y)), path)
    assert run(Problem(model, ce(), (X, y), forward=lambda m, batch: m.inner(batch[0])), path).value == first.value


@pytest.mark.parametrize("second", [0, "whole"])
def test_outputs_in_chunks_give_the_same_numbers(second, tmp_path):
    path = tmp_path / "run.safetensors"
    tokens = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(0))

    def problem(output_memory):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Embedding(11, 4), nn.Tanh(), nn.Linear(4, 11)).double()
        loss = ce()
        return Problem(
            model,
            loss,
            [(tokens, tokens.roll(1, 1))],
            forward=lambda m, batch: m(batch[0]).transpose(1, 2),
            output_memory=output_memory,
        )

    first = run(problem(0), path)
    other = problem(float("inf") if second == "whole" else 0)
    assert run(other, path).value == first.value


def test_one_more_pass_and_none_without_a_file(tmp_path, counted_model):
    def calls_with(path):
        problem, calls = counted_model("mlp")
        run(problem, path)
        return calls(), len(problem.data.source)

    (without, batches), (with_file, _) = calls_with(None), calls_with(tmp_path / "run.safetensors")
    assert with_file <= without + batches
