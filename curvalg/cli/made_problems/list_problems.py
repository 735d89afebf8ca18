"""The built-in problems: small networks trained on scikit-learn's handwritten digits.

The images come with scikit-learn (1797 of 8 x 8 pixels, ten classes), so nothing is downloaded; training takes about a
second. It stops early on purpose, while C − 1 eigenvalues of the GGN still stand clear of the rest. Nothing of the
caller's random state is used or changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from curvalg.distributed.making import make_group
from curvalg.distributed.shard import own_batches
from curvalg.errors import ProblemError
from curvalg.problem import Problem

# Uneven on purpose: results must not depend on how the data is cut into batches.
_BATCHES = (512, 700, 585)


def digits(group: Any = None) -> Problem:
    """A 64-32-10 network with tanh on handwritten digits; 2410 parameters, cross-entropy."""
    return _trained(lambda: nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), (64,), 5, group)


def digits_cnn(group: Any = None) -> Problem:
    """Two convolutions and a linear layer with tanh on handwritten digits; 1898 parameters, cross-entropy."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    return _trained(build, (1, 8, 8), 8, group)


BUILT_IN: Mapping[str, Callable[..., Problem]] = MappingProxyType({"digits": digits, "digits-cnn": digits_cnn})
"""Name on the command line -> function that makes the problem, of the processes of a group where it is given one."""


def _trained(build: Callable[[], nn.Module], image: tuple[int, ...], epochs: int, group: Any) -> Problem:
    images, labels = _load_digits()
    images = images.reshape(len(images), *image)
    # Not torch.manual_seed: it would seed the generators of every accelerator too, which the fork leaves alone here.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        model = build()
        processes = make_group(group, torch.device("cpu"), nullcontext())
        with processes.together("training"):  # on one alone: another kind of processor may round in another way
            if not processes.rank:
                _train(model, images, labels, epochs)
            model.load_state_dict(processes.first(model.state_dict()))
    batches = list(zip(images.split(_BATCHES), labels.split(_BATCHES), strict=True))
    own = [batches[i] for i in own_batches(len(batches), group)]
    return Problem(model.eval(), nn.CrossEntropyLoss(), own, group=group)


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 64) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), device="cpu").split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()


def _load_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ProblemError(
            f'the digits problems need scikit-learn ({error}); install it: pip install "curvalg[demo]"'
        ) from error
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32, device="cpu"), torch.tensor(
        labels, dtype=torch.long, device="cpu"
    )
