"""Peak memory of fresh products, as multiples of one gradient evaluation.

Each figure is taken in a process of its own, and net of what the same takes on a toy model (libraries and what they load at
first use)::

    python benchmarks/memory.py

The cases with a vocabulary of 50,000 (width 128; 4 x 256 tokens and 3 layers, or 32 x 256 and 6) are compared with a gradient
in plain torch that takes the loss in chunks of as many positions. In the small ones vectors of the parameters' size are most
of it: a product holds the model, its private copy, the vector and the result, a gradient the model and the result.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import torch
import torch.nn.functional as F
from models import Transformer
from torch import Tensor, nn

TOY, CASES = "toy", ("2000 classes", "50000 classes, tied", "50000 classes, untied", "50000 classes, tied, 32 x 256")
PRODUCTS = ("ggn", "hessian", "covariance", "centered_covariance")
CHUNKED = ("ggn", "hessian", "problem.gradient()", "problem.value()")


def make(case: str) -> tuple[Transformer, tuple[Tensor, Tensor]]:
    """Model and data of a case."""
    torch.manual_seed(0)
    if case == TOY:
        return Transformer(50, 16, 1, 8), (torch.randint(0, 50, (2, 8)), torch.randint(0, 50, (2, 8)))
    if case == CASES[0]:
        return Transformer(), (torch.randint(0, 2000, (64, 64)), torch.randint(0, 2000, (64, 64)))
    rows, layers = (32, 6) if case == CASES[3] else (4, 3)
    model = Transformer(vocabulary=50_000, length=256, layers=layers)
    if "untied" not in case:
        model.head.weight = model.embed.weight
    return model, (torch.randint(0, 50_000, (rows, 256)), torch.randint(0, 50_000, (rows, 256)))


def chunked_gradient(model: Transformer, tokens: Tensor, targets: Tensor, positions: int = 55) -> None:
    """The gradient with the outputs of a few positions at a time, left in ``.grad``."""
    x = model.embed(tokens) + model.position[: tokens.shape[1]]
    h = model.norm(model.blocks(x)).flatten(0, 1)
    leaf = h.detach().requires_grad_()
    for part, labels in zip(leaf.split(positions), targets.flatten().split(positions), strict=True):
        (F.cross_entropy(model.head(part), labels, reduction="sum") / targets.numel()).backward()
    h.backward(leaf.grad)


def measure(case: str, what: str) -> int:
    """Peak resident memory of this process in bytes after one evaluation of ``what``."""
    from curvalg import Problem, registry

    model, data = make(case)
    if what == "gradient":
        torch.autograd.grad(F.cross_entropy(model(data[0]), data[1]), list(model.parameters()))
    elif what == "chunked gradient":
        chunked_gradient(model, *data)
    else:
        problem = Problem(model, nn.CrossEntropyLoss(), data, cache=0)
        actions = {"problem.gradient()": problem.gradient, "problem.value()": problem.value}
        actions.get(what, lambda: registry.build(what).lower(problem) @ torch.randn(problem.size))()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print the tables."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    for case in CASES:
        first, *others = ("gradient", *PRODUCTS) if case == CASES[0] else ("chunked gradient", *CHUNKED)
        print(case)
        unit = net(case, first)
        for what, peak in {first: unit, **{what: net(case, what) for what in others}}.items():
            print(f"  {what:20} {peak / 2**20:8.0f} MiB  {peak / unit:5.2f} gradients")


def net(case: str, what: str) -> int:
    """Peak of a case, in bytes, beyond that of the toy."""
    peaks = []
    for model in (case, TOY):
        run = subprocess.run([sys.executable, __file__, model, what], capture_output=True, text=True, check=True)
        peaks.append(int(json.loads(run.stdout)))
    return peaks[0] - peaks[1]


if __name__ == "__main__":
    main()
