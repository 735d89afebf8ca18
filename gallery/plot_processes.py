r"""
Curvature on several processes
==============================

After this page you can compute spectra on several processes, each with a part of the data, and know that the numbers are those
of one process. Two processes on one machine stand here for the GPUs of a cluster.
"""

# %%
# One function for any number of processes
# ----------------------------------------
# The whole difference is ``shard``, which gives a process its batches, and ``group=``, which says with whom the sums over data
# are shared. The batches are uneven: 600 images in batches of 70, five on one process and four on the other. The code is
# written to a file here, since ``torchrun`` starts files.

import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

CODE = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from curvalg import Problem, distributed, registry
from curvalg.estimate import eigsh, spectral_density


def spectrum(group=None):
    torch.manual_seed(0)  # the same weights on all ranks
    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(images[:600] / 16), torch.tensor(labels[:600]))
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    data = distributed.shard(dataset, batch_size=70, group=group)
    problem = Problem(model, nn.CrossEntropyLoss(), data, group=group)
    hessian = registry.build("hessian").lower(problem)
    pairs = eigsh(hessian, k=6, which="LA", tol=1e-8)
    density = spectral_density(hessian, probes=2, steps=20)
    exchange = problem.group
    before = exchange.headers, exchange.payloads, exchange.bytes
    hessian @ torch.ones(problem.size, dtype=torch.float64)
    after = exchange.headers, exchange.payloads, exchange.bytes
    return {
        "batches": len(data),
        "samples": problem.num_samples,
        "parameters": problem.size,
        "eigenvalues": pairs.eigenvalues,
        "grid": density.grid,
        "density": density.density,
        "exchanged": [b - a for a, b in zip(before, after)],
    }


if __name__ == "__main__":
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(spectrum(dist.group.WORLD), f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
"""

folder = Path(tempfile.mkdtemp())
(folder / "digits_spectrum.py").write_text(CODE)

# %%
# Two processes
# -------------
# ``torchrun --nproc-per-node=2 digits_spectrum.py`` starts them. Every rank makes the same calls and gets the whole result.

command = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--max-restarts=2",
]
command += [
    "--nproc-per-node=2",
    "digits_spectrum.py",
]  # torch may lose a process while it ends
done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
assert done.returncode == 0, done.stderr
first, second = (torch.load(folder / f"rank{rank}.pt") for rank in range(2))
print(
    f"batches: {first['batches']} and {second['batches']}; samples of the problem: "
    f"{first['samples']}"
)

assert {first["batches"], second["batches"]} == {4, 5}
assert first["samples"] == second["samples"] == 600
assert torch.equal(first["eigenvalues"], second["eigenvalues"])
assert torch.equal(first["density"], second["density"])

# %%
# One process
# -----------
# The same function without a group. The loss divides by the number of all samples in both cases, so that nothing has to be
# averaged; and the random vectors of the density are drawn alike.

sys.path.insert(0, str(folder))
from digits_spectrum import spectrum  # noqa: E402

alone = spectrum()
for one, two in zip(
    alone["eigenvalues"].flip(0).tolist(),
    first["eigenvalues"].flip(0).tolist(),
    strict=True,
):
    print(f"{one:.12f} on one process, {two:.12f} on two")

torch.testing.assert_close(
    first["eigenvalues"], alone["eigenvalues"], rtol=1e-9, atol=0
)
torch.testing.assert_close(first["grid"], alone["grid"], rtol=1e-9, atol=1e-12)
torch.testing.assert_close(first["density"], alone["density"], rtol=1e-6, atol=1e-9)

# %%
# What was exchanged
# ------------------
# A product with one vector takes one exchange: a header, by which a rank that failed, holds other weights or makes another
# call is an error on all ranks, and a sum of as many numbers as there are parameters.

headers, payloads, bytes_ = first["exchanged"]
print(
    f"a product: {headers} header, {payloads} payload of {bytes_} bytes for "
    f"{first['parameters']} parameters"
)

assert (headers, payloads, bytes_) == (1, 1, 8 * first["parameters"])
assert alone["exchanged"] == [0, 0, 0]

# %%
# The spectra
# -----------
# Both curves, and how far the eigenvalues are apart.

blue, red, grey = "#0b3c5d", "#c8553d", "#e3e5e8"
figure, panels = plt.subplots(
    1, 2, figsize=(9.5, 3.8), width_ratios=[1.6, 1], layout="constrained"
)
panels[0].plot(
    alone["grid"],
    alone["density"],
    color=blue,
    linewidth=3,
    alpha=0.35,
    label="one process",
)
panels[0].plot(
    first["grid"],
    first["density"],
    "--",
    color=red,
    linewidth=1.3,
    label="two processes",
)
panels[0].set(xlabel="λ", ylabel="density", yscale="log", ylim=(1e-4, None))
panels[0].legend(frameon=False)
panels[0].set_title("Spectral density of the Hessian", loc="left", color=blue)

apart = (first["eigenvalues"] / alone["eigenvalues"] - 1).abs().clamp_min(1e-17)
panels[1].plot(alone["eigenvalues"], apart, "o", color=red)
panels[1].axhline(
    torch.finfo(torch.float64).eps,
    color=blue,
    linewidth=1,
    linestyle=":",
    label="rounding of one number",
)
panels[1].set(
    xlabel="eigenvalue", ylabel="relative difference", yscale="log", ylim=(1e-18, 1e-9)
)
panels[1].legend(frameon=False)
panels[1].set_title("Two processes against one", loc="left", color=blue)
for axes in panels:
    axes.grid(axis="y", color=grey)
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
