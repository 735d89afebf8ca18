r"""
Sub-matrices and the curvature of each layer
============================================

After this page you can ask for the curvature of a layer, of a single tensor or of any group of parameters, compare layers by
trace and largest eigenvalue, work with vectors in the shapes of the parameters, and know how the numbers of the layers add
up to those of the whole network.
"""

# %%
# A network
# ---------
# Two convolutions and two linear layers on 250 images of handwritten digits, trained for a few epochs.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Identity, Problem, block_diagonal, inverse, registry, restrict
from curvalg.estimate import eigsh, trace

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X = torch.tensor(images[:250] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
y = torch.tensor(labels[:250])
model = nn.Sequential()
model.add_module("conv1", nn.Conv2d(1, 4, 3, padding=1))
model.add_module("act1", nn.Tanh())
model.add_module("conv2", nn.Conv2d(4, 6, 3, stride=2))
model.add_module("act2", nn.Tanh())
model.add_module("flat", nn.Flatten())
model.add_module("hidden", nn.Linear(54, 10))
model.add_module("act3", nn.Tanh())
model.add_module("last", nn.Linear(10, 10))
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(20):
    for rows in torch.randperm(len(X)).split(25):
        optimizer.zero_grad()
        loss(model(X[rows]), y[rows]).backward()
        optimizer.step()

problem = Problem(model.double(), loss, (X.double(), y))
layers = ("conv1", "conv2", "hidden", "last")
for name, shape in problem.layout.shapes.items():
    print(f"{name:14} {tuple(shape)}")
print(problem, f"loss {problem.value():.3f}")

# %%
# Restrictions
# ------------
# :func:`~curvalg.restrict` takes names or glob patterns, and gives the sub-matrix of the rows and columns that belong to
# them. Its vectors have the layout of these parameters alone; a dict of tensors goes in, a dict of tensors comes out.

ggn, hessian = registry.build("ggn"), registry.build("hessian")
print(
    restrict(ggn, "conv1.*"),
    restrict(ggn, "*.bias"),
    restrict(ggn, ["last.weight", "hidden.weight"]),
    sep="\n",
)

kernel = {"conv1.weight": torch.ones(4, 1, 3, 3, dtype=torch.float64)}
product = restrict(hessian, "conv1.weight").lower(problem) @ kernel
print({name: tuple(t.shape) for name, t in product.items()})

# %%
# The same numbers are the corresponding part of a product with the whole matrix, with zeros for all other parameters. The
# other way to select parameters is for the whole problem, with ``params=``.

everywhere = {
    name: torch.zeros(shape, dtype=torch.float64)
    for name, shape in problem.layout.shapes.items()
} | kernel
whole = hessian.lower(problem) @ everywhere
torch.testing.assert_close(product["conv1.weight"], whole["conv1.weight"])
selected = Problem(model, loss, (X.double(), y), params="conv1.weight")
torch.testing.assert_close(product, hessian.lower(selected) @ kernel)

# %%
# Layer by layer
# --------------
# The largest eigenvalue and the trace of each layer's block, of GGN and Hessian.

largest, traces = {}, {}
for name, expr in (("ggn", ggn), ("hessian", hessian)):
    ops = {layer: restrict(expr, f"{layer}.*").lower(problem) for layer in layers}
    largest[name] = [
        float(eigsh(op, 1, which="LA").eigenvalues[0]) for op in ops.values()
    ]
    traces[name] = [op.exact("trace") for op in ops.values()]
sizes = [ops[layer].shape[0] for layer in layers]
for i, layer in enumerate(layers):
    print(
        f"{layer:7} {sizes[i]:4} parameters, trace of GGN {traces['ggn'][i]:6.2f}, of "
        f"Hessian {traces['hessian'][i]:6.2f}, "
        f"largest eigenvalues {largest['ggn'][i]:.3f} and {largest['hessian'][i]:.3f}"
    )

# %%
# Traces add up: those of the layers are the trace of the whole, which an estimate of the whole confirms. Eigenvalues do not.
# The largest of a block is at most that of the whole (Cauchy), and for a positive semi-definite matrix the largest of the
# whole is at most the sum of those of the blocks: it is nearer to the sum the more the layers act together.

for name, expr in (("ggn", ggn), ("hessian", hessian)):
    op = expr.lower(problem)
    estimate = trace(op, method="xtrace")
    assert abs(estimate.value - sum(traces[name])) < 4 * estimate.error + 1e-9
    top = float(eigsh(op, 1, which="LA").eigenvalues[0])
    print(
        f"{name:7} trace {sum(traces[name]):.3f}, estimated {estimate.value:.3f} ± "
        f"{estimate.error:.3f}"
    )
    print(
        f"{name:7} largest eigenvalue {top:.3f}, of the layers at most "
        f"{max(largest[name]):.3f}"
    )
    assert max(largest[name]) <= top * (1 + 1e-6)
    if name == "ggn":
        assert top <= sum(largest[name])
        whole_top = top

# %%
# The last layer enters the outputs linearly, so there the Hessian is the GGN.

np.testing.assert_allclose(traces["hessian"][-1], traces["ggn"][-1])
np.testing.assert_allclose(largest["hessian"][-1], largest["ggn"][-1], rtol=1e-4)

# %%
# All blocks at once
# ------------------
# :func:`~curvalg.block_diagonal` keeps the blocks and drops what is between them: by module, by parameter (weights and biases
# apart), or by groups of names of your own. Its largest eigenvalue is that of the largest block, and its inverse is made of
# the inverses of the blocks.

by_module = block_diagonal(ggn, by="module")
top = float(eigsh(by_module.lower(problem), 1, which="LA").eigenvalues[0])
np.testing.assert_allclose(top, max(largest["ggn"]), rtol=1e-3)

gradient = problem.gradient()
natural = problem.layout.unflatten(
    inverse(by_module + 1e-2 * Identity).lower(problem) @ gradient
)
own = inverse(restrict(ggn, "hidden.*") + 1e-2 * Identity).lower(problem)
parts = problem.layout.unflatten(gradient)
alone = own @ {name: parts[name] for name in ("hidden.weight", "hidden.bias")}
torch.testing.assert_close(alone["hidden.weight"], natural["hidden.weight"])

# %%
# What is between the layers
# --------------------------
# For a positive semi-definite matrix the Frobenius norm of the block between two layers is at most the geometric mean of
# those of their own blocks. The ratio says how strongly they are coupled. ``layout.slices`` says where a parameter is in a
# vector, and so where its rows and columns are.

dense, slices = ggn.lower(problem).to_dense(), problem.layout.slices
at = {
    layer: slice(slices[f"{layer}.weight"].start, slices[f"{layer}.bias"].stop)
    for layer in layers
}
norms = np.array([[float(dense[at[a], at[b]].norm()) for b in layers] for a in layers])
coupling = norms / np.sqrt(np.outer(norms.diagonal(), norms.diagonal()))
assert (coupling <= 1 + 1e-12).all()
kept = float(np.linalg.norm(norms.diagonal())) / float(dense.norm())
print(f"the blocks of the layers hold {kept:.0%} of the Frobenius norm")

# %%
# Left and middle: traces and largest eigenvalues, with the number of parameters. The first convolution is the smallest layer
# and has by far the largest eigenvalue. Right: the coupling of the layers, which is anything but weak between neighbours:
# this is what a block-diagonal approximation leaves out.

blue, red = "#0b3c5d", "#c8553d"
for name in ("ggn", "hessian"):
    assert largest[name][0] > 1.5 * max(largest[name][1:])
assert all(coupling[i, i + 1] > coupling[0, 3] for i in range(3))
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(9.5, 3.8), layout="constrained", width_ratios=(1, 1, 1.05)
)
place = np.arange(len(layers))
for axes, numbers, title in (
    (left, traces, "trace"),
    (middle, largest, "largest eigenvalue"),
):
    axes.bar(place - 0.2, numbers["ggn"], 0.4, color=blue, label="GGN")
    axes.bar(place + 0.2, numbers["hessian"], 0.4, color=red, label="Hessian")
    axes.set_xticks(
        place, [f"{layer}\n{size}" for layer, size in zip(layers, sizes, strict=True)]
    )
    axes.set_title(f"{title} of each layer", loc="left", color=blue, fontsize=11)
    axes.grid(axis="y", color="#e3e5e8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
middle.axhline(whole_top, color="#5b6470", linestyle=":", linewidth=1.5)
middle.text(
    len(layers) - 0.6,
    whole_top,
    "whole network, GGN",
    ha="right",
    va="bottom",
    fontsize=8,
    color="#5b6470",
)
left.set_ylim(top=1.15 * max(traces["hessian"]))
left.legend(frameon=False, ncols=2, loc="upper left")
left.set_xlabel("layer, parameters")
middle.set_xlabel("layer, parameters")
right.imshow(coupling, cmap="Blues", vmin=0, vmax=1)
for i, j in np.ndindex(coupling.shape):
    right.text(
        j,
        i,
        f"{coupling[i, j]:.2f}",
        ha="center",
        va="center",
        color="white" if coupling[i, j] > 0.6 else blue,
    )
right.set_xticks(place, layers)
right.set_yticks(place, layers)
right.tick_params(length=0)
right.set_title("coupling in the GGN", loc="left", color=blue, fontsize=11)
plt.show()
