"""What new users write by mistake: each message names what to do. The same calls without the mistake pass."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from curvalg import Diagonal, Identity, Problem, Zero, estimate, inverse, registry

CROSS_ENTROPY = nn.CrossEntropyLoss()


def network(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *(between or (nn.Tanh(),)), nn.Linear(8, 3))


def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 4, generator=generator), torch.arange(12) % 3


class Rows(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        X, y = rows()
        return X[i], y[i]


def problem(model=None, loss=CROSS_ENTROPY, data=None, **options):
    return Problem(network() if model is None else model, loss, rows() if data is None else data, **options)


def ggn():
    return registry.build("ggn")


def ones(*shape, **options):
    return torch.ones(shape or 67, **options)


SHAPES = [(8, 4), (8,), (3, 8), (3,)]
"""Of the parameters of the network."""


def stale():
    model = network()
    op = ggn().lower(problem(model))
    with torch.no_grad():
        model[0].weight.add_(1e-3)
    return op @ ones()


class OutOfMemory(nn.Module):
    """Fails as torch does where memory is short."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate"
        )


X, y = rows()
MISTAKES = {
    "a vector on another device": (
        lambda: ggn().lower(problem()) @ ones(device="meta"),
        r"move it with x\.to\('cpu'\)",
    ),
    "data in double precision": (lambda: problem(data=(X.double(), y)).value(), r"convert one of them, as by X\.to\("),
    "a target of another length": (
        lambda: problem(data=(X, y[:5])).value(),
        r"expected index targets of shape \(12,\)",
    ),
    "a target that broadcasts": (
        lambda: problem(nn.Linear(4, 1), nn.MSELoss(), (X, torch.ones(12))).value(),
        r"use target\.reshape\(\(12, 1\)\)",
    ),
    "no lower": (lambda: ggn() @ ones(), r"write expr\.lower\(problem\) @ vector"),
    "no lower, in SciPy": (lambda: scipy.sparse.linalg.eigsh(ggn(), 2), r"pass expr\.lower\(problem\)"),
    "no lower, in an estimator": (lambda: estimate.trace(ggn()), r"becomes an operator by expr\.lower\(problem\)"),
    "lowered on a model": (lambda: ggn().lower(network()), r"expr\.lower\(model, loss, data\)"),
    "a list for one batch": (lambda: problem(data=[X, y]).value(), r"one batch is a tuple \(X, y\)"),
    "a data set for a loader": (lambda: problem(data=Rows()), r"pass torch\.utils\.data\.DataLoader\(dataset"),
    "tensors of a data set": (lambda: problem(data=TensorDataset(X, y)), r"DataLoader\(dataset, batch_size"),
    "NumPy data": (lambda: problem(data=(X.numpy(), y.numpy())).value(), r"with torch\.from_numpy"),
    "a batch of a tokenizer": (
        lambda: problem(data=[{"input_ids": y[None], "labels": y[None]}]).value(),
        r"pass forward=lambda model, batch",
    ),
    "dropout on": (lambda: ggn().lower(problem(network(nn.Dropout()))) @ ones(), r"Call model\.eval\(\)"),
    "a vector of another length": (lambda: ggn().lower(problem()) @ ones(66), r"expected shape \(67,\) or \(67, K\)"),
    "labels as floats": (lambda: problem(data=(X, y.float())).value(), r"pass target\.long\(\)"),
    "loss and data swapped": (lambda: Problem(network(), (X, y), CROSS_ENTROPY), r"Problem\(model, loss, data\)"),
    "model and loss swapped": (lambda: Problem(CROSS_ENTROPY, network(), (X, y)), r"Problem\(model, loss, data\)"),
    "data before the model": (lambda: Problem((X, y), network(), CROSS_ENTROPY), r"Problem\(model, loss, data\)"),
    "parameters of another model": (
        lambda: problem(params=[nn.Parameter(ones())]),
        r"params\[0\] are of another one, or copies; pass names or glob patterns instead, such as params='0\.weight'",
    ),
    "a generator of parameters, used up": (lambda: problem(params=iter([])), r"used up before; pass a list, or names"),
    "names and a tensor": (lambda: problem(params=["0.weight", ones()]), r"got a tensor beside names"),
    "an array that is not finite": (lambda: Diagonal(ones() / 0), r"values must be finite.*torch\.nan_to_num"),
    "gradients of unequal numbers of samples": (
        lambda: problem().layout.flatten(
            [ones(n, *s) for n, s in zip((2, 3, 2, 2), SHAPES, strict=True)], leading=True
        ),
        r"as many samples on the leading axis of each tensor, got \{'0\.weight': 2, '0\.bias': 3",
    ),
    "queries of other parameters": (
        lambda: estimate.influence((ggn() + Identity).lower(problem()), problem(params="0.weight")),
        r"the problem of the queries has no '0\.bias'; make the problem of the queries with the same model",
    ),
    "parameters for a model": (lambda: Problem(network().parameters(), CROSS_ENTROPY, (X, y)), r"chosen by params="),
    "a generator": (lambda: problem(data=((X, y) for _ in range(2))).value(), r"pass list\(data\)"),
    "a plugin that is not installed": (lambda: registry.build("my_matrix"), r"once it is installed"),
    "a wrong option": (lambda: registry.build("kfac", approx="expand"), r"did you mean 'approximation'"),
    "a wrong value of an option": (
        lambda: registry.build("kfac", approximation="exp"),
        r"must be Literal\['expand', 'reduce'\]",
    ),
    "a misspelt name": (lambda: registry.build("hesian"), r"did you mean 'hessian'"),
    "a model that moved": (stale, r"call operator\.refresh\(\)"),
    "a singular inverse": (lambda: inverse(ggn()).lower(problem()) @ ones(), r"add damping, c \* Identity"),
    "conjugate gradients on a Hessian": (
        lambda: inverse(registry.build("hessian"), solver="cg").lower(problem()) @ ones(),
        r"add damping or a preconditioner",
    ),
    "a number added": (lambda: ggn() + 1e-3, r"write A \+ 0\.001 \* Identity"),
    "the identity called": (lambda: ggn() + 1e-3 * Identity(), r"write Identity"),
    "zero called": (lambda: Zero(), r"write Zero"),
    "a loss by name": (lambda: problem(loss="cross_entropy"), r"write torch\.nn\.CrossEntropyLoss\(\)"),
    "the class of a loss": (lambda: problem(loss=nn.CrossEntropyLoss), r"create it: CrossEntropyLoss\(\)"),
    "a name for an expression": (lambda: inverse("ggn"), r"registry\.build\('ggn'\)"),
    "too many eigenvalues": (lambda: estimate.eigsh(ggn().lower(problem()), 100), r"expected 1 ≤ k ≤ 67"),
    "another word for an end": (
        lambda: estimate.eigsh(ggn().lower(problem()), 2, which="largest"),
        r"'LA', 'SA', 'LM', 'BE'",
    ),
    "not enough memory": (lambda: problem(OutOfMemory()).value(), r"[Uu]se smaller batches"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_message_names_the_cure(mistake):
    wrong, cure = MISTAKES[mistake]
    with pytest.raises(Exception, match=cure):
        wrong()


def test_what_is_no_mistake():
    """Integer and double vectors, lists of parameters, loaders that shuffle, models in place of a Problem."""
    op = ggn().lower(problem())
    wanted = op @ ones()
    assert torch.equal(op @ ones(dtype=torch.long), wanted)
    assert torch.allclose(op @ ones(dtype=torch.float64), wanted.double())
    assert np.allclose(op @ np.ones(67, dtype=int), wanted.numpy())
    assert torch.equal(ggn().lower(network(), CROSS_ENTROPY, rows()) @ ones(), wanted)
    shuffled = problem(data=DataLoader(Rows(), 5, shuffle=True))
    assert torch.allclose(ggn().lower(shuffled) @ ones(), wanted, rtol=1e-4, atol=1e-7)
    model = network()
    head = problem(model, params=model[2].parameters())
    assert head.layout.names == ["2.weight", "2.bias"]
    assert problem(model, params=[model[0].bias]).layout.names == ["0.bias"]
