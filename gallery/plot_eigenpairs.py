r"""
Eigenvalues and eigenvectors of a trained network
=================================================

After this page you can compute the eigenvalues at either end of a Hessian's spectrum with their eigenvectors, know how far
off they may be, read an eigenvector in the shapes of the model's parameters, and see how far from the trained parameters
an eigenvalue still describes the loss. The network is small enough to compare everything with its dense Hessian.
"""

# %%
# Data and model
# --------------
# A convolutional network on six hundred images of handwritten digits, trained for forty epochs in single precision. Its
# Hessian :math:`H` is that of the mean loss over the same images, in double precision.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Problem, registry
from curvalg.estimate import eigsh

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X = torch.tensor(images[:600] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
y = torch.tensor(labels[:600])

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
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
for _ in range(40):
    for rows in torch.randperm(len(X)).split(50):
        optimizer.zero_grad()
        loss(model(X[rows]), y[rows]).backward()
        optimizer.step()
    schedule.step()

model, X = model.double(), X.double()
problem = Problem(model, loss, (X, y))
hessian = registry.build("hessian").lower(problem)
print(problem)

# %%
# Both ends of the spectrum
# -------------------------
# ``which`` says where: ``"LA"`` the largest, ``"SA"`` the smallest, ``"BE"`` half of each. The search needs nothing but
# products :math:`H v`. The few large eigenvalues stand apart and come quickly; at the lower end they lie close together and
# take more products.

pairs = {which: eigsh(hessian, 8, which=which) for which in ("LA", "SA", "BE")}
for which, found in pairs.items():
    values = " ".join(f"{float(value):.4f}" for value in found.eigenvalues)
    print(
        f"{which}: {values}\n    {found.products} products, largest residual "
        f"{float(found.residuals.max()):.0e}"
    )

# %%
# The negative eigenvalues are larger than their residuals by orders of magnitude, so they are no rounding errors: where
# training ended the loss still curves downwards in some directions, a hundredth as strongly as it curves upwards in others.

lowest, highest = pairs["SA"].eigenvalues[0], pairs["LA"].eigenvalues[-1]
assert lowest < -1000 * pairs["SA"].residuals[0]
assert 0.005 < -lowest / highest < 0.02
assert pairs["LA"].products < pairs["SA"].products

# %%
# How good they are
# -----------------
# The residual :math:`r = \lVert H v - \theta v \rVert` of a unit vector :math:`v` bounds the distance from :math:`\theta`
# to the nearest eigenvalue. By default the search ends when every residual is below :math:`10^{-4} |\lambda|_{\max}`. The
# error of an eigenvalue is usually much smaller than that bound, of the order of :math:`r^2` over the gap to the rest of the
# spectrum. The dense matrix, which takes a product for each parameter, shows what the errors are.

exact, basis = torch.linalg.eigh(hessian.to_dense())
scale = exact.abs().max()
rounding = 1e-13 * scale
for which, found in pairs.items():
    errors = (found.eigenvalues[:, None] - exact).abs().min(1).values
    assert (found.residuals <= 1e-4 * scale).all()
    assert (errors <= found.residuals + rounding).all()
    print(
        f"{which}: nearest eigenvalue at most {float(errors.max()):.0e} away, bound "
        f"{float(found.residuals.max()):.0e}"
    )

# %%
# The nearest eigenvalue need not be the one of the same rank. Where neighbours are closer than the tolerance, as at the
# lower end, a search may settle on the fifth smallest in place of the fourth, with a residual as small as was asked for.
# A ``tol`` below the gaps between the eigenvalues settles the ranks too.

ends = {"LA": exact[-8:], "SA": exact[:8], "BE": torch.cat([exact[:4], exact[-4:]])}
sharp = {which: eigsh(hessian, 8, which=which, tol=1e-8) for which in ends}
for which, found in sharp.items():
    errors = (found.eigenvalues - ends[which]).abs()
    assert (found.residuals <= 1e-8 * scale).all()
    assert (errors <= found.residuals + rounding).all()
    gap = (found.eigenvalues[:, None] - exact).abs().kthvalue(2, 1).values.min()
    print(
        f"{which}: {found.products} products, errors up to {float(errors.max()):.0e}, "
        f"smallest gap {float(gap):.0e}"
    )

# %%
# The sine of the angle between :math:`v` and the true eigenvector is at most the residual over the distance from
# :math:`\theta` to the other eigenvalues: an eigenvector is only as good as its eigenvalue is isolated.

for found in (pairs["LA"], sharp["LA"]):
    sines = (
        found.eigenvectors - basis[:, -8:] * (basis[:, -8:] * found.eigenvectors).sum(0)
    ).norm(dim=0)
    distances = (found.eigenvalues[:, None] - exact).abs().kthvalue(2, 1).values
    assert (sines <= found.residuals / distances + 1e-10).all()
    print(
        f"{found.products} products, largest sine of an angle {float(sines.max()):.0e}"
    )

top, bottom = sharp["LA"], sharp["SA"]

# %%
# Where an eigenvector lives
# --------------------------
# ``unflatten(i)`` gives eigenvector :math:`i` as a dict of tensors in the shapes of the parameters. Its squared entries sum
# to one, so each layer holds a share of it.

layers = {
    "convolution": ("0.weight", "0.bias"),
    "hidden": ("3.weight", "3.bias"),
    "last": ("5.weight", "5.bias"),
}


def shares(found, i):
    named = found.unflatten(i)
    return [
        sum(float(named[name].square().sum()) for name in names)
        for names in layers.values()
    ]


top_shares = np.array([shares(top, i) for i in reversed(range(8))])
bottom_shares = np.array([shares(bottom, i) for i in range(8)])
sizes = np.array(
    [
        sum(problem.layout.shapes[name].numel() for name in names)
        for names in layers.values()
    ]
)
np.testing.assert_allclose(top_shares.sum(1), 1)
for name, size, high, low in zip(
    layers, sizes, top_shares.mean(0), bottom_shares.mean(0), strict=True
):
    print(
        f"{name:12} {size / problem.size:4.0%} of the parameters, {high:4.0%} of the "
        f"top, {low:4.0%} of the bottom"
    )

# %%
# The top eigenvectors live in the first two layers: the convolution has a larger share of them than of the parameters. The
# most negative curvature sits in the last layer far beyond its size.

assert top_shares.mean(0)[0] > 3 * sizes[0] / problem.size
assert bottom_shares.mean(0)[2] > 3 * sizes[2] / problem.size

colours = ("#0b3c5d", "#c8553d", "#d9a441")
figure, (left, right) = plt.subplots(
    1,
    2,
    figsize=(9.5, 3.9),
    layout="constrained",
    gridspec_kw={"width_ratios": (1.7, 1)},
)
everything = np.vstack([top_shares, bottom_shares, sizes[None] / problem.size])
at = np.array([*range(8), *range(9, 17), 18])
start = np.zeros(len(at))
for name, colour, part in zip(layers, colours, everything.T, strict=True):
    left.bar(at, part, bottom=start, width=0.8, color=colour, label=name)
    start += part
values = [f"{v:.2f}" for v in top.eigenvalues.flip(0).tolist()] + [
    f"{v:.3f}" for v in bottom.eigenvalues.tolist()
]
left.set_xticks(at, [*values, "size"], rotation=90)
left.set(ylim=(0, 1), ylabel="share of the squared norm")
left.set_title(
    "Layers of the eigenvectors of the Hessian, by eigenvalue",
    loc="left",
    color="#0b3c5d",
)
left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
left.spines[["top", "right"]].set_visible(False)

# The eigenvector of the largest eigenvalue, in the six filters of the convolution.
filters = top.unflatten(7)["0.weight"][:, 0]
limit = float(filters.abs().max())
tiles = np.full((2 * 4 - 1, 3 * 4 - 1), np.nan)
for number, kernel in enumerate(filters):
    row, column = divmod(number, 3)
    tiles[4 * row : 4 * row + 3, 4 * column : 4 * column + 3] = kernel
picture = right.imshow(tiles, cmap="RdBu", vmin=-limit, vmax=limit)
right.set(xticks=[], yticks=[])
right.spines[:].set_visible(False)
right.set_title(
    f"λ = {float(top.eigenvalues[-1]):.2f} in the six filters",
    loc="left",
    color="#0b3c5d",
)
figure.colorbar(picture, ax=right, shrink=0.7, location="bottom", pad=0.02)
plt.show()

# %%
# The loss along an eigenvector
# -----------------------------
# Along a unit eigenvector :math:`v` with eigenvalue :math:`\lambda`,
#
# .. math:: L(w + t v) = L(w) + t \, g^\top v + \tfrac{1}{2} \lambda t^2 + O(t^3),
#
# with the gradient :math:`g`. The same dict that showed the layers moves the parameters.

gradient = problem.gradient()
weights = {name: p.detach() for name, p in model.named_parameters()}


def loss_at(direction, t):
    moved = {name: weights[name] + t * direction[name] for name in weights}
    with torch.no_grad():
        return float(loss(torch.func.functional_call(model, moved, X), y))


def model_at(found, i, t):
    slope = float(gradient @ found.eigenvectors[:, i])
    return (
        loss_at(found.unflatten(i), 0)
        + t * slope
        + float(found.eigenvalues[i]) * t**2 / 2
    )


chosen = {"largest": (top, 7), "smallest": (bottom, 0)}
for name, (found, i) in chosen.items():
    errors = [
        abs(loss_at(found.unflatten(i), t) - model_at(found, i, t))
        for t in (0.004, 0.002)
    ]
    print(f"{name}: halving t divides the error by {errors[0] / errors[1]:.2f}")
    assert 7 < errors[0] / errors[1] < 9

# %%
# Halving :math:`t` divides the error by about eight, which only the right slope and the right :math:`\lambda` can do.
# Further out the model fails, along both: up the steep walls the loss grows more slowly than the square, and along the
# smallest eigenvalue the higher orders soon turn it upwards again, so that little can be gained there.

figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.9), layout="constrained")
for axes, (name, (found, i)) in zip(panels, chosen.items(), strict=True):
    t = np.linspace(-1.5, 1.5, 61)
    direction, value = found.unflatten(i), float(found.eigenvalues[i])
    axes.plot(
        t,
        [loss_at(direction, float(s)) for s in t],
        color="#0b3c5d",
        linewidth=2,
        label="loss",
    )
    axes.plot(
        t,
        model_at(found, i, t),
        "--",
        color="#c8553d",
        linewidth=1.6,
        label="quadratic model",
    )
    axes.axvline(0, color="#c9ced4", linestyle=":", zorder=0)
    axes.set(xlabel="t", ylabel="mean loss")
    axes.set_title(
        f"Along the {name} eigenvalue, λ = {value:.3g}", loc="left", color="#0b3c5d"
    )
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
plt.show()

# %%
# Long searches
# -------------
# On a large network a search takes hours. With ``checkpoint=`` it is written to a file now and then; the same call after an
# interruption goes on where it stopped, and to the same bits. Here the second call finds the search finished.

with tempfile.TemporaryDirectory() as folder:
    first = eigsh(hessian, 8, which="LA", checkpoint=Path(folder) / "top.pt")
    again = eigsh(hessian, 8, which="LA", checkpoint=Path(folder) / "top.pt")
assert torch.equal(first.eigenvectors, again.eigenvectors)
assert first.products == again.products
