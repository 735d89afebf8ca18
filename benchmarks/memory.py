"""Peak memory of fresh products, net of a process that only imports, as multiples of one gradient evaluation.

Each figure is taken in a process of its own::

    python benchmarks/memory.py

The cases with a vocabulary of 50,000 (4 x 256 tokens, width 128) are compared with a gradient in plain torch that takes the
loss in chunks of as many positions.
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

CASES = ("2000 classes", "50000 classes, tied", "50000 classes, untied")
PRODUCTS = ("ggn", "hessian", "covariance", "centered_covariance")
CHUNKED = ("ggn", "hessian", "problem.gradient()", "problem.value()")


def make(case: str) -> tuple[Transformer, tuple[Tensor, Tensor]]:
    """Model and data of a case."""
    torch.manual_seed(0)
    if case == CASES[0]:
        return Transformer(), (torch.randint(0, 2000, (64, 64)), torch.randint(0, 2000, (64, 64)))
    model = Transformer(vocabulary=50_000, length=256)
    if case == CASES[1]:
        model.head.weight = model.embed.weight
    return model, (torch.randint(0, 50_000, (4, 256)), torch.randint(0, 50_000, (4, 256)))


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

    if what != "import":
        model, data = make(case)
        if what == "gradient" and case == CASES[0]:
            torch.autograd.grad(F.cross_entropy(model(data[0]), data[1]), list(model.parameters()))
        elif what == "gradient":
            chunked_gradient(model, *data)
        elif what.startswith("problem."):
            problem = Problem(model, nn.CrossEntropyLoss(), data, cache=0)
            _ = problem.gradient() if "gradient" in what else problem.value()
        else:
            problem = Problem(model, nn.CrossEntropyLoss(), data, cache=0)
            registry.build(what).lower(problem) @ torch.randn(problem.size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print the tables."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    for case in CASES:
        peaks = {}
        for what in ("import", "gradient", *(PRODUCTS if case == CASES[0] else CHUNKED)):
            run = subprocess.run([sys.executable, __file__, case, what], capture_output=True, text=True, check=True)
            peaks[what] = json.loads(run.stdout)
        base = peaks.pop("import")
        print(case)
        for what, peak in peaks.items():
            net = peak - base
            print(f"  {what:20} {net / 2**20:8.0f} MiB  {net / (peaks['gradient'] - base):5.2f} gradients")


if __name__ == "__main__":
    main()
