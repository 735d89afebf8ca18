r"""
KFAC against EKFAC against exact blocks
=======================================

After this page you can build the block-diagonal of the GGN and three Kronecker approximations of it, see layer by layer
what each of them misses, and measure what that costs a damped natural-gradient step. The approximations of a layer with
inputs :math:`h` and output gradients :math:`\delta` are

* ``kfac``: :math:`B \otimes A` with the second moments :math:`B = \sum \delta \delta^\top` and
  :math:`A = \operatorname{mean} h h^\top`, as if :math:`h` and :math:`\delta` were independent;
* ``ekfac``: the eigenvectors of :math:`B \otimes A`, with the eigenvalues that fit the exact block best;
* ``foof``: :math:`I \otimes A`, which looks at no gradient at all.
"""

# %%
# Data and model
# --------------
# A small convolutional network on images of handwritten digits, trained for a few epochs.

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Identity, Problem, block_diagonal, inverse, registry, restrict

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X, y = (
    torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8),
    torch.tensor(labels),
)

model = nn.Sequential(
    nn.Conv2d(1, 6, 3, stride=2, padding=1),
    nn.Tanh(),
    nn.Flatten(),
    nn.Linear(96, 10),
    nn.Tanh(),
    nn.Linear(10, 10),
)
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(5):
    for rows in torch.randperm(len(X)).split(64):
        optimizer.zero_grad()
        loss(model(X[rows]), y[rows]).backward()
        optimizer.step()

problem = Problem(model.double(), loss, (X[:400].double(), y[:400]))
print(problem)
layers = {"convolution": "0.*", "hidden layer": "3.*", "last layer": "5.*"}

# %%
# Exact blocks
# ------------
# ``block_diagonal(ggn, by="module")`` keeps the coupling of a layer's parameters and drops that between layers. The
# restriction of the GGN to a layer is one of its blocks.

ggn = registry.build("ggn")
blocks = block_diagonal(ggn, by="module")
approximations = {name: registry.build(name) for name in ("kfac", "ekfac", "foof")}
exact = {
    layer: restrict(ggn, params).lower(problem).to_dense()
    for layer, params in layers.items()
}

whole = blocks.lower(problem).to_dense()
at = 0
for matrix in exact.values():
    end = at + len(matrix)
    torch.testing.assert_close(whole[at:end, at:end], matrix)
    at = end
assert at == problem.size

# %%
# How far off is each layer?
# --------------------------
# The first number is the relative Frobenius error. The second is the error after the best rescaling of the layer, which
# is fairer to ``foof``: the identity in place of :math:`B` leaves its scale undetermined.

dense = {
    name: {
        layer: restrict(expr, params).lower(problem).to_dense()
        for layer, params in layers.items()
    }
    for name, expr in approximations.items()
}
errors = {}
for name, matrices in dense.items():
    for layer, matrix in matrices.items():
        target = exact[layer]
        cosine = (matrix * target).sum() / matrix.norm() / target.norm()
        errors[name, layer] = float((matrix - target).norm() / target.norm())
        rescaled = float((1 - cosine**2).sqrt())
        print(
            f"{name:6} {layer:13} relative error {errors[name, layer]:6.2f}, rescaled "
            f"{rescaled:.2f}"
        )

# %%
# EKFAC keeps the basis of KFAC and takes the best diagonal matrix in it, so it can only be nearer. By how much depends on
# the layer: the eigenvectors themselves are still those of a Kronecker product.

for layer in layers:
    assert errors["ekfac", layer] <= errors["kfac", layer]

# %%
# In the convolution, places share the weights. KFAC's default, "expand", treats each place as a sample of its own;
# "reduce" averages inputs and adds gradients over places first.

for approximation in ("expand", "reduce"):
    matrix = (
        restrict(registry.build("kfac", approximation=approximation), "0.*")
        .lower(problem)
        .to_dense()
    )
    target = exact["convolution"]
    print(
        f"convolution, {approximation}: relative error "
        f"{float((matrix - target).norm() / target.norm()):.2f}"
    )

# %%
# What the blocks look like
# -------------------------
# Absolute values of the weights' entries, on one logarithmic scale per layer; of the hidden layer only the weights into its
# first two units. ``foof`` is drawn after its best rescaling, since it would be off the scale.

cut = {
    "convolution": slice(0, 54),
    "hidden layer": slice(0, 192),
    "last layer": slice(0, 100),
}
figure, panels = plt.subplots(3, 4, figsize=(9.5, 7.2), layout="constrained")
for row, layer in zip(panels, layers, strict=True):
    foof = dense["foof"][layer]
    foof = foof * ((foof * exact[layer]).sum() / foof.square().sum())
    shown = {
        "exact block": exact[layer],
        "kfac": dense["kfac"][layer],
        "ekfac": dense["ekfac"][layer],
        "foof": foof,
    }
    top = float(exact[layer][cut[layer], cut[layer]].abs().max())
    for axes, (name, matrix) in zip(row, shown.items(), strict=True):
        entries = matrix[cut[layer], cut[layer]].abs().clamp_min(1e-12)
        picture = axes.imshow(
            entries,
            norm=LogNorm(1e-3 * top, top),
            cmap="Blues",
            interpolation="nearest",
        )
        axes.set(xticks=[], yticks=[])
        if layer == "convolution":
            axes.set_title(
                "foof, rescaled" if name == "foof" else name, color="#0b3c5d"
            )
        if name in dense:
            error = float((matrix - exact[layer]).norm() / exact[layer].norm())
            axes.set_xlabel(f"relative error {error:.2f}")
    row[0].set_ylabel(layer)
    figure.colorbar(picture, ax=list(row), shrink=0.8, extend="both")
plt.show()

# %%
# As a damped inverse
# -------------------
# The natural-gradient step with damping :math:`\lambda` is :math:`(G + \lambda I)^{-1} \nabla L`. All matrices here have
# exact inverses, so every step is exact too. An approximation is good if its step points where that of the full GGN does.


def step(expr, damping):
    return inverse(expr + damping * Identity).lower(problem) @ gradient


def alignment(a, b):
    return float(a @ b / a.norm() / b.norm())


gradient = problem.gradient()
dampings = [float(f"{damping:.2g}") for damping in np.logspace(-6, 1, 15)]
natural = [step(ggn, damping) for damping in dampings]
candidates = {"exact blocks": blocks, **approximations}
steps = {
    name: [step(expr, damping) for damping in dampings]
    for name, expr in candidates.items()
}
same = {
    name: [alignment(a, b) for a, b in zip(of, natural, strict=True)]
    for name, of in steps.items()
}
tuned = {
    name: [max(alignment(a, b) for a in of) for b in natural]
    for name, of in steps.items()
}
same["gradient"] = tuned["gradient"] = [alignment(gradient, b) for b in natural]

for name, cosines in same.items():
    print(f"{name:13}", " ".join(f"{cosine:.2f}" for cosine in cosines))

# %%
# Each of them is a far better step than the gradient while the damping is small, and all agree when it is large. Exact
# blocks lead at small damping. Around 10⁻² they have no advantage over their Kronecker approximations: what is missing
# there is the coupling between layers, which none of them has. The gap between EKFAC and KFAC in the steps is much smaller
# than in the Frobenius error of the convolution: that error weighs the largest eigenvalues most, while the step at small
# damping hangs on the small ones.

for name in candidates:
    assert same[name][0] > 5 * same["gradient"][0]
    assert same[name][-1] > 0.95
for name in approximations:
    assert same["exact blocks"][0] > same[name][0]

# %%
# On the right each step may choose its own damping among the fifteen, as one does in practice.

colours = dict(
    zip(same, ("#0b3c5d", "#c8553d", "#d9a441", "#5b8db8", "#9aa3ad"), strict=True)
)
styles = dict(zip(same, ("-", "-", "--", "-", ":"), strict=True))
figure, panels = plt.subplots(
    1, 2, figsize=(9.5, 4.2), layout="constrained", sharey=True
)
for axes, curves, title in zip(
    panels,
    (same, tuned),
    ("with the same damping", "with its own best damping"),
    strict=True,
):
    for name, cosines in curves.items():
        axes.plot(
            dampings,
            cosines,
            styles[name],
            color=colours[name],
            label=name,
            linewidth=1.8,
        )
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="damping of the full GGN")
    axes.set_title(title, loc="left", color="#0b3c5d")
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("cosine with the natural-gradient step")
panels[1].legend(frameon=False, loc="lower right")
plt.show()
