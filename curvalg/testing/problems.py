"""The problems that terms are checked on by default: tiny, and different where terms go wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from curvalg.errors import ProblemError
from curvalg.losses import CrossEntropy
from curvalg.problem import Problem

ROWS = (2, 3)
"""Rows of each batch: ragged, so that a term that divides by a batch's size is found out."""


class _Tied(nn.Module):
    """A model whose token embedding is tied to the output layer; classes on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 4, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(tokens)))).transpose(1, 2)  # type: ignore[no-any-return]


class _Sequence(nn.Module):
    """A model with a class for every token; classes on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(4, 3), nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(tokens).cumsum(1)))  # type: ignore[no-any-return]


def _mlp(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, outputs))


def _batches(X: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(ROWS), y.split(ROWS), strict=True))


def _labels(*shape: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, (sum(ROWS), *shape), device="cpu")


def _inputs(*shape: int) -> Tensor:
    return torch.randn(sum(ROWS), *shape, dtype=torch.float64, device="cpu")


def _classifier() -> Problem:
    return Problem(_mlp().double(), nn.CrossEntropyLoss(), _batches(_inputs(3), _labels()))


def _single_precision() -> Problem:
    return Problem(_mlp(), nn.CrossEntropyLoss(), _batches(_inputs(3).float(), _labels()))


def _convolution() -> Problem:
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    loss = nn.CrossEntropyLoss(reduction="sum")
    return Problem(net, loss, _batches(_inputs(1, 3, 3), _labels(classes=2)))


def _tied_embedding() -> Problem:
    data = _batches(_labels(2, classes=4), _labels(2, classes=4))
    return Problem(_Tied().double(), nn.CrossEntropyLoss(), data)


def _positions() -> Problem:
    data = _batches(_labels(2, classes=4), _labels(2))
    return Problem(_Sequence().double(), CrossEntropy(class_axis=-1), data, samples="position")


def _classes_last() -> Problem:
    labels = _labels(2)
    labels[1] = labels[4, 0] = -100  # a whole row, which is no sample then, and one position of another
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device="cpu")
    data = _batches(_labels(2, classes=4), labels)
    return Problem(_Sequence().double(), CrossEntropy(class_axis=-1, weight=weight), data)


def _regression() -> Problem:
    return Problem(_mlp(2).double(), nn.MSELoss(), _batches(_inputs(3), _inputs(2)))


PROBLEMS: Mapping[str, Callable[[], Problem]] = {
    "classifier": _classifier,
    "classifier in float32": _single_precision,
    "convolution, sum loss": _convolution,
    "tied embedding, classes on axis 1": _tied_embedding,
    "sequence, classes on the last axis, weighted, some targets ignored": _classes_last,
    "sequence, samples are positions": _positions,
    "regression": _regression,
}
"""Name -> function that makes the problem."""


def _cubes(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().pow(3).sum()


def _without_loss() -> Problem:
    return Problem(_mlp().double(), None, _batches(_inputs(3), _inputs(3)))


def _plain_function() -> Problem:
    return Problem(_mlp().double(), _cubes, _batches(_inputs(3), _inputs(3)), reduction="sum")


def _not_convex() -> Problem:
    data = _batches(_inputs(3), torch.rand(sum(ROWS), 3, dtype=torch.float64, device="cpu"))
    return Problem(_mlp().double(), nn.PoissonNLLLoss(log_input=False), data)


UNSUITABLE: Mapping[str, Callable[[], Problem]] = {
    "no loss": _without_loss,
    "a loss that is a plain function": _plain_function,
    "a loss without classes": _regression,
    "a loss that is not convex": _not_convex,
}
"""Problems that a term may refuse, but only with an error of curvalg's own."""


def make(maker: Callable[[], Problem], seed: int = 0) -> Problem:
    """A problem with fixed weights and data; the caller's random state is left alone."""
    # Not torch.manual_seed: it would seed the generators of every accelerator too, which the fork leaves alone here.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return maker()


def default_problems(*names: str) -> list[Problem]:
    """Make the problems that :func:`~curvalg.testing.check_term` uses unless others are given.

    Args:
        names: of some of them, as failures print them; none for all.

    Raises:
        ProblemError: an unknown name.

    >>> from curvalg.testing import default_problems
    >>> max(problem.size for problem in default_problems())
    28
    >>> default_problems("regression")
    [Problem(Sequential, MSE, 20 parameters in 4 tensors, torch.float64 on cpu)]
    """
    if unknown := [name for name in names if name not in PROBLEMS]:
        raise ProblemError(f"there is no problem called {unknown[0]!r}; choose among {', '.join(map(repr, PROBLEMS))}")
    return [make(PROBLEMS[name]) for name in names or PROBLEMS]
