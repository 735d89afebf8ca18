r"""
Curvature of a model in parts
=============================

After this page you can compute spectra of a model that was cut by ``fully_shard``, so that no process holds all of its
parameters or a whole vector, and know that the numbers are those of one process. Two processes on one machine stand here for
the GPUs that a large model would need.
"""

# %%
# A small language model, whole or cut
# ------------------------------------
# Two blocks of causal attention over text, with an embedding that is the head as well. What training under ``fully_shard`` does
# is done here: each block is cut over the processes, and then the rest. ``group=mesh`` is all that the problem needs to know.

import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

CODE = """
import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from curvalg import Problem, distributed, registry
from curvalg.estimate import eigsh, spectral_density

TEXT = "a number that may be wrong is worse than a refusal, "
TEXT = 4 * (TEXT + "and a refusal that names no cure is half a bug. ")
LETTERS = sorted(set(TEXT))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x):
        mixed = self.mix(self.norms[0](x)).unflatten(-1, (3, 2, -1))
        q, k, v = mixed.permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(gelu(self.wide(self.norms[1](x))))


class GPT(nn.Module):
    def __init__(self, width=16, places=12):
        super().__init__()
        self.tokens = nn.Embedding(len(LETTERS), width)
        self.places = nn.Embedding(places, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, len(LETTERS), bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, text):
        x = self.tokens(text) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return self.head(x).transpose(1, 2)


def spectrum(mesh=None):
    torch.manual_seed(0)  # the same weights on all ranks
    model = GPT().double()
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    numbers = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    rows = numbers[: 13 * (len(numbers) // 13)].view(-1, 13)
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    dataset = torch.utils.data.TensorDataset(inputs, targets)
    data = distributed.shard(dataset, batch_size=8, group=mesh)
    options = {"group": mesh, "samples": "position", "cache": 0}
    problem = Problem(model, nn.CrossEntropyLoss(), data, **options)
    hessian = registry.build("hessian").lower(problem)
    pairs = eigsh(hessian, k=4, which="LA", tol=1e-7, block=1)
    density = spectral_density(hessian, probes=2, steps=16)
    # Whole on the first process, None on others.
    top = problem.layout.full(pairs.eigenvectors[:, -1])
    return {
        "numbers": problem.size,
        "of": problem.layout.whole.size,
        "eigenvalues": pairs.eigenvalues,
        "top": top,
        "grid": density.grid,
        "density": density.density,
        "held": pairs.eigenvectors.numel(),
    }


if __name__ == "__main__":
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    distributed.start()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.save(spectrum(mesh), f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
"""

folder = Path(tempfile.mkdtemp())
(folder / "sharded_spectrum.py").write_text(CODE)

# %%
# Two processes, each with half of the numbers
# --------------------------------------------
# Parameters, gradients, products and all vectors of Lanczos lie in parts. A block's weights come together while it runs,
# forward and on both ways back, and are dropped again.

command = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--max-restarts=2",
]
command += [
    "--nproc-per-node=2",
    "sharded_spectrum.py",
]  # torch may lose a process while it ends
done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
assert done.returncode == 0, done.stderr
first, second = (torch.load(folder / f"rank{rank}.pt") for rank in range(2))
for rank, found in enumerate((first, second)):
    print(
        f"rank {rank}: {found['numbers']} of {found['of']} parameters, eigenvectors of "
        f"{found['held']} numbers"
    )

assert first["numbers"] + second["numbers"] == first["of"]
assert max(first["numbers"], second["numbers"]) < 0.55 * first["of"]
assert torch.equal(first["eigenvalues"], second["eigenvalues"])
assert second["top"] is None

# %%
# One process that has all
# ------------------------
# The same function without a mesh. Random vectors are drawn by the place of each number in the whole vector, so that seeds mean
# the same vectors on any number of processes; and no step size was tuned, since nothing is a difference.

sys.path.insert(0, str(folder))
from sharded_spectrum import spectrum  # noqa: E402

alone = spectrum()
for one, two in zip(
    alone["eigenvalues"].flip(0).tolist(),
    first["eigenvalues"].flip(0).tolist(),
    strict=True,
):
    print(f"{one:.12f} whole, {two:.12f} in parts")

torch.testing.assert_close(
    first["eigenvalues"], alone["eigenvalues"], rtol=1e-9, atol=1e-12
)
torch.testing.assert_close(first["grid"], alone["grid"], rtol=1e-9, atol=1e-12)
torch.testing.assert_close(first["density"], alone["density"], rtol=1e-6, atol=1e-9)
assert abs(float(first["top"] @ alone["top"])) > 1 - 1e-6  # eigenvectors have no sign

# %%
# The spectra
# -----------
# Both curves, and what each process holds.

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
    label="in parts on two",
)
panels[0].set(xlabel="λ", ylabel="density", yscale="log", ylim=(1e-4, None))
panels[0].legend(frameon=False)
panels[0].set_title("Spectral density of the Hessian", loc="left", color=blue)

bars = {
    "one process": alone["numbers"],
    "rank 0 of 2": first["numbers"],
    "rank 1 of 2": second["numbers"],
}
panels[1].bar(list(bars), list(bars.values()), color=[blue, red, red], width=0.6)
panels[1].set_ylabel("numbers of a vector")
panels[1].set_title("What a process holds", loc="left", color=blue)
for axes in panels:
    axes.grid(axis="y", color=grey)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
