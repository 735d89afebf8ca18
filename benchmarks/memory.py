"""Peak memory of fresh products, net of a process that only imports, as multiples of one gradient evaluation.

Each figure is taken in a process of its own::

    python benchmarks/memory.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import torch
import torch.nn.functional as F
from models import Transformer
from torch import nn


def measure(what: str) -> int:
    """Peak resident memory of this process in bytes after one evaluation of ``what``."""
    from curvalg import Problem, registry

    if what != "import":
        torch.manual_seed(0)
        model, data = Transformer(), (torch.randint(0, 2000, (64, 64)), torch.randint(0, 2000, (64, 64)))
        if what == "gradient":
            torch.autograd.grad(F.cross_entropy(model(data[0]), data[1]), list(model.parameters()))
        else:
            problem = Problem(model, nn.CrossEntropyLoss(), data, cache=0)
            registry.build(what).lower(problem) @ torch.randn(problem.size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print the table."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    peaks = {}
    for what in ("import", "gradient", "ggn", "hessian", "covariance", "centered_covariance"):
        run = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, check=True)
        peaks[what] = json.loads(run.stdout)
    base = peaks.pop("import")
    for what, peak in peaks.items():
        net = peak - base
        print(f"{what:20} {net / 2**20:8.0f} MiB  {net / (peaks['gradient'] - base):5.2f} gradients")


if __name__ == "__main__":
    main()
