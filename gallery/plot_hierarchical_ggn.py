r"""
What the parts of the GGN do
============================

After this page you can split the Gauss-Newton matrix of a classifier into four parts, take parts away, and say which
eigenvalues each of them made. The spectra of such matrices have a staircase: about as many outliers as classes, a second
step of about the square of that, and a bulk. Papyan (arXiv 2008.11865) explains the steps by the classes of the gradients;
here his knock-out experiment runs on two small networks, and works on one of them better than on the other.
"""

# %%
# The decomposition
# -----------------
# Let :math:`p_i` be the predicted probabilities of image :math:`i`, :math:`J_i` the Jacobian of its outputs, and
# :math:`g_{ik} = J_i^\top (p_i - e_k)` the gradient that the image would have if its label were :math:`k`. With weights
# :math:`w_{ik} = p_{ik} / N`,
#
# .. math:: G = \sum_i \sum_k w_{ik} \, g_{ik} g_{ik}^\top .
#
# Group these gradients by the true class :math:`c = y_i` and by :math:`k`. A weighted sum of squares splits as in an
# analysis of variance: means of the classes, means of the pairs :math:`(c, k)` around them, gradients around those.
#
# * ``ggn_class``: :math:`\sum_c W_c \, \bar g_c \bar g_c^\top`, the class means over all wrong :math:`k \ne c`, rank at
#   most :math:`C`;
# * ``ggn_cross``: :math:`\sum_c \sum_{k \ne c} W_{ck} (\bar g_{ck} - \bar g_c)(\bar g_{ck} - \bar g_c)^\top`, rank at
#   most :math:`C (C - 2)`;
# * ``ggn_within``: what remains of every single gradient around its :math:`\bar g_{ck}`;
# * ``ggn_same``: the means of the pairs :math:`(c, c)`, rank at most :math:`C`.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Problem, registry

images, labels = load_digits(return_X_y=True)
labels = torch.tensor(labels)
chosen = torch.cat([torch.nonzero(labels == c)[:12, 0] for c in range(10)])
X, y = torch.tensor(images, dtype=torch.float32)[chosen] / 16, labels[chosen]
X = X - X.mean(0)

# %%
# Two networks
# ------------
# Both have three hidden layers of 64 units, no biases, and are trained with weight decay to the end, where every training
# image is classified correctly. One of them has batch-norm, which is in evaluation mode afterwards: a sample's output then
# depends on no other sample, as the decomposition requires.


def train(batch_norm):
    torch.manual_seed(0)
    layers = []
    for _ in range(3):
        norm = [nn.BatchNorm1d(64, affine=False)] if batch_norm else []
        layers += [nn.Linear(64, 64, bias=False), *norm, nn.ReLU()]
    model, loss = (
        nn.Sequential(*layers, nn.Linear(64, 10, bias=False)),
        nn.CrossEntropyLoss(),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for _ in range(100):
        for rows in torch.randperm(len(X)).split(50):
            optimizer.zero_grad()
            decay = 2.5e-3 * sum(p.square().sum() for p in model.parameters())
            (loss(model(X[rows]), y[rows]) + decay).backward()
            optimizer.step()
        schedule.step()
    return model.eval().double(), loss


problems, features, names = (
    {},
    {},
    {False: "without batch-norm", True: "with batch-norm"},
)
for batch_norm, name in names.items():
    model, loss = train(batch_norm)
    problems[name] = problem = Problem(model, loss, (X.double(), y))
    with torch.no_grad():
        features[name] = model[:-1](X.double())
        p = model(X.double()).softmax(1)
    accuracy = (p.argmax(1) == y).double().mean()
    own = p[range(len(y)), y]
    print(
        f"{name:18} {problem.size} parameters, accuracy {accuracy:.1%}, p of the label "
        f"{own.min():.2f} to {own.max():.2f}"
    )
    assert accuracy == 1

# %%
# The parts sum to the whole
# --------------------------
# The parts are expressions like any other, so the statement is a line of algebra. Its right-hand side and the GGN share
# one sweep over the data; class statistics cost a second.

ggn = registry.build("ggn")
parts = {
    name: registry.build(f"ggn_{name}") for name in ("class", "cross", "within", "same")
}
rest = ggn - parts["class"] - parts["cross"] - parts["within"] - parts["same"]
for problem in problems.values():
    v = torch.randn(
        problem.size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    error = (rest.lower(problem) @ v).norm() / (ggn.lower(problem) @ v).norm()
    print(f"relative error of the sum {error:.1e}")
    assert error < 1e-12

# %%
# Knock-outs
# ----------
# Take the parts away one after another. All matrices live in the column space :math:`U` of the GGN, whose dimension is at
# most 120 images times nine, so nothing is lost by looking at :math:`U^\top A \, U`: the eigenvalues below are all there
# are, up to zeros, and exact. ``exact("eigh")`` finds :math:`U` through a Gram matrix; the rest is products with many columns.

C = 10
steps = ("GGN", "− class", "− class − cross", "− class − cross − within")
spectra, cosines = {}, {}
for name, problem in problems.items():
    pairs = ggn.lower(problem).exact("eigh")
    U = pairs.vectors(slice(None))
    left = torch.diag(pairs.eigenvalues)
    spectra[name] = {steps[0]: pairs.eigenvalues.flip(0)}
    small = {}
    for step, part in zip(steps[1:], ("class", "cross", "within"), strict=True):
        small[part] = U.T @ (parts[part].lower(problem) @ U)
        left = left - small[part]
        spectra[name][step] = torch.linalg.eigvalsh(left).flip(0)
    small["same"] = left
    shares = {
        part: float(matrix.trace() / pairs.eigenvalues.sum())
        for part, matrix in small.items()
    }
    cosines[name] = float(
        (small["class"] * small["cross"]).sum()
        / small["class"].norm()
        / small["cross"].norm()
    )
    print(f"{name}: {len(pairs.eigenvalues)} eigenvalues above rounding")
    print(
        "  share of the trace:",
        ", ".join(f"{part} {share:.0%}" for part, share in shares.items()),
    )
    for step, values in spectra[name].items():
        print(
            f"  {step:26}",
            " ".join(
                f"λ{n}={float(values[n - 1]):.2g}"
                for n in (1, 2, C - 1, C, C + 1, 50, 90, 91)
            ),
        )

# %%
# What the numbers say
# --------------------
# Subtracting a matrix of rank :math:`C` can bring the largest eigenvalue down to the :math:`(C+1)`-th at best (Weyl). With
# batch-norm ``ggn_class`` all but does: the ten outliers vanish, and what is on top now was the eleventh eigenvalue. Without
# batch-norm the largest eigenvalue falls to less than half, still well above the tenth of before, and it takes
# ``ggn_cross`` to remove the outliers.

batch_norm, plain = spectra["with batch-norm"], spectra["without batch-norm"]
for values in (batch_norm, plain):
    assert values["− class"][0] >= values["GGN"][C] * (1 - 1e-9)
assert batch_norm["− class"][0] < batch_norm["GGN"][C - 1]
assert batch_norm["− class"][0] < 1.3 * batch_norm["GGN"][C]
assert plain["− class"][0] > 1.3 * plain["GGN"][C - 1]
assert plain["− class − cross"][0] < plain["GGN"][C - 1]

# %%
# The reason is in the features. In the last layer :math:`\bar g_{ck} \approx (p_c - e_k) \otimes h_c`, with the mean
# features :math:`h_c` of a class. Where those of different classes are orthogonal, the class and cross-class parts of all
# classes live in different directions. Where they share a direction :math:`h`, the deviations :math:`-e_k \otimes h` of
# every class :math:`c` fall on the same few vectors, :math:`C - 1` terms each, and make outliers of their own: in the very
# directions of the class means. Batch-norm in the hidden layers brings features of classes apart.

for name, h in features.items():
    means = torch.stack([h[y == c].mean(0) for c in range(C)])
    means = means / means.norm(dim=1, keepdim=True)
    angle = float(((means @ means.T).sum() - C) / (C * (C - 1)))
    print(
        f"{name:18} cosine of class features {angle:.2f}, of ggn_class with ggn_cross "
        f"{cosines[name]:.2f}"
    )
assert cosines["with batch-norm"] < cosines["without batch-norm"] / 2

# %%
# ``ggn_cross`` has at most :math:`C (C - 2) = 80` non-zero eigenvalues. Without it the eigenvalues up to number 90 fall,
# but there is no visible step at 90 in either network: with 120 images the part within pairs of classes is as large there.
# Once that is gone too, the ten eigenvalues of ``ggn_same`` are left, small since every :math:`p` of the label is near 1.

for values in spectra.values():
    assert (
        values["− class − cross"][49:90].sum() < 0.75 * values["− class"][49:90].sum()
    )
    assert values["− class − cross − within"][C] < 1e-8 * values["GGN"][0]

# %%
# The spectra
# -----------
# Eigenvalues by rank; the outliers and the place of the second step are marked.

colours = dict(zip(steps, ("#0b3c5d", "#c8553d", "#d9a441", "#9aa3ad"), strict=True))
figure, panels = plt.subplots(
    1, 2, figsize=(9.5, 4.4), layout="constrained", sharex=True, sharey=True
)
for axes, (name, curves) in zip(panels, spectra.items(), strict=True):
    axes.axvspan(0.85, C + 0.5, color="#eef2f5", zorder=0)
    axes.axvline(C * (C - 1) + 0.5, color="#c9ced4", linestyle=":", zorder=0)
    for step, values in curves.items():
        shown = values[:C] if step == steps[-1] else values
        axes.plot(
            np.arange(1, len(shown) + 1),
            shown,
            "o-",
            color=colours[step],
            markersize=3.5,
            linewidth=1,
            label=step,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(0.85, 500),
        ylim=(1e-3, 3.5),
        xlabel="eigenvalue number",
    )
    axes.set_xticks([1, 10, 90, 500], ["1", "C = 10", "C² − C = 90", "500"])
    axes.minorticks_off()
    axes.set_title(name, loc="left", color="#0b3c5d")
    axes.grid(axis="y", color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("eigenvalue")
panels[1].legend(frameon=False, loc="lower left")
plt.show()
