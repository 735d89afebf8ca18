r"""
A visual tour of all matrices
=============================

After this page you have seen every matrix that curvalg knows by name, on one network small enough to draw them whole, and
know how they hang together: which are parts of which, which are approximations, and which are the same. The list is not
written here but taken from the registry, so a matrix that you register or install shows up too.
"""

# %%
# A network of 43 parameters
# --------------------------
# Four measurements of a flower, five hidden units, three species. Eighteen flowers, six of each, are enough: their 54
# outputs make the matrices on output space about as large as those on parameter space.

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import SymLogNorm
from sklearn.datasets import load_iris
from torch import nn

from curvalg import Identity, MatrixTerm, Problem, block_diagonal, registry
from curvalg.estimate import heat_map

torch.manual_seed(0)
measurements, species = load_iris(return_X_y=True)
measurements = (measurements - measurements.mean(0)) / measurements.std(0)
chosen = np.concatenate([np.flatnonzero(species == c)[:6] for c in range(3)])
X, y = torch.tensor(measurements[chosen]), torch.tensor(species[chosen])

model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
for _ in range(25):
    optimizer.zero_grad()
    loss(model(X), y).backward()
    optimizer.step()

problem = Problem(model, loss, (X, y))
N, C, D = problem.num_samples, 3, problem.size
print(problem, f"loss {problem.value():.3f}")

# %%
# All of them
# -----------
# ``registry.names()`` lists what can be built, from curvalg itself and from every installed plugin. ``empirical_fisher`` is
# another name of ``covariance``, and is left out. Options keep their defaults.

names = [name for name in registry.names() if registry.spec(name).name == name]
ops = {name: registry.build(name).lower(problem) for name in names}
dense = {name: op.to_dense() for name, op in ops.items()}
for name in names:
    print(f"{name:29} {registry.spec(name).summary}")

# %%
# What an operator says of itself in ``facts`` must be true of its matrix: symmetric, positive semi-definite. Unknown is
# ``None``, and nothing is claimed. Differences of gradients (``hessian_fd``) are symmetric up to their error.

for name, op in ops.items():
    if op.facts.symmetric:
        rounding = 1e-8 if name == "hessian_fd" else 1e-12
        torch.testing.assert_close(dense[name], dense[name].T, rtol=1e-9, atol=rounding)
    if op.facts.psd:
        values = torch.linalg.eigvalsh(dense[name])
        assert values[0] > -1e-12 * values[-1], name
assert ops["ggn"].facts.psd is True
assert ops["hessian"].facts.psd is None
assert torch.linalg.eigvalsh(dense["hessian"])[0] < 0

# %%
# How they hang together
# ----------------------
# The Hessian is the Gauss-Newton matrix and a residual, the curvature of the network itself. The Gauss-Newton matrix is
# the curvature of the loss seen through the Jacobian, is the Fisher information for a cross-entropy, and falls into four
# parts by class.


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


jacobian, ggn = dense["jacobian"], dense["ggn"]
same(dense["hessian"], ggn + dense["residual"])
same(ggn, jacobian.T @ dense["loss_hessian"] @ jacobian)
same(ggn, dense["fisher"])
same(ggn, sum(dense[f"ggn_{part}"] for part in ("class", "cross", "within", "same")))
same(dense["ntk"], jacobian @ jacobian.T)

# %%
# The covariances of the gradients of single samples differ by the mean gradient. The diagonals are those of the whole
# matrices; that of the Hessian is an estimate, and better with more probes.

gradient = problem.gradient()
same(
    dense["covariance"] - dense["centered_covariance"], torch.outer(gradient, gradient)
)
for whole in ("ggn", "covariance", "centered_covariance"):
    same(dense[f"{whole}_diagonal"], torch.diag(dense[whole].diagonal()))


def distance(name, to, **options):
    return float(
        (registry.build(name, **options).lower(problem).to_dense() - to).norm()
        / to.norm()
    )


diagonal = torch.diag(dense["hessian"].diagonal())
errors = [
    distance("hessian_diagonal", diagonal, probes=probes) for probes in (16, 1024)
]
print(
    f"diagonal of the Hessian, relative error {errors[0]:.2f} by 16 probes, "
    f"{errors[1]:.2f} by 1024"
)
assert errors[1] < errors[0] / 3

# %%
# Monte-Carlo versions replace an expectation over labels by draws. A hundred times the draws divide the error by about ten.

errors = [
    np.mean([distance("ggn_mc", ggn, samples=m, seed=seed) for seed in range(8)])
    for m in (1, 100)
]
print(
    f"Monte-Carlo GGN, relative error {errors[0]:.2f} with one draw a sample, "
    f"{errors[1]:.3f} with a hundred"
)
assert 5 < errors[0] / errors[1] < 20

# %%
# The Kronecker products approximate the blocks of the GGN that belong to one layer. EKFAC keeps the eigenvectors of KFAC and
# corrects the eigenvalues, so it is never further off.

blocks = block_diagonal(registry.build("ggn"), by="module").lower(problem).to_dense()
errors = {
    name: float((dense[name] - blocks).norm() / blocks.norm())
    for name in ("kfac", "ekfac")
}
print(
    ", ".join(f"{name}: relative error {error:.2f}" for name, error in errors.items())
)
assert errors["ekfac"] <= errors["kfac"] < 1

# %%
# Some have few dimensions: one for each class, each pair of classes, each sample, each output that can vary freely.

ranks = {name: int(torch.linalg.matrix_rank(dense[name], rtol=1e-9)) for name in names}
most = {
    "ggn_class": C,
    "ggn_same": C,
    "ggn_cross": C * (C - 2),
    "covariance": N,
    "centered_covariance": N - 1,
}
most |= {"ggn": N * (C - 1), "loss_hessian": N * (C - 1), "ntk": D}
for name, limit in most.items():
    print(f"{name:20} rank {ranks[name]:2}, at most {limit}")
    assert ranks[name] <= limit

# %%
# Groups
# ------
# Where a matrix belongs is found from its expression and its entries: the spaces it maps between, whether it is made as an
# explicit matrix, whether anything lies off its diagonal, who brought it.


def group(name):
    expr, matrix = registry.build(name), dense[name]
    if "outputs" in (expr.domain, expr.codomain):
        return "Matrices of the outputs: 18 flowers by 3 classes"
    if not (matrix - torch.diag(matrix.diagonal())).any():
        return "Diagonals"
    if isinstance(expr, MatrixTerm):
        return "Explicit matrices, a block for each layer"
    built_in = registry.spec(name).origin == "built-in"
    return (
        "Sums over samples, built in"
        if built_in
        else "Sums over samples and classes, from plugins"
    )


groups = {}
for name in names:
    groups.setdefault(group(name), []).append(name)
for members in groups.values():
    members.sort(key=lambda name: "_" in name)
assert sum(map(len, groups.values())) == len(names)

# %%
# The tour
# --------
# Blue is negative, red is positive, white is zero. Each panel is divided by its largest entry, and the colours are
# logarithmic over three powers of ten. Lines separate the weights and biases of the two layers; in matrices of the outputs
# they separate the species.
#
# Things to look for: the residual is empty where the last layer meets itself, since the outputs are linear in its
# weights, and within the first layer it couples no two hidden units. The Monte-Carlo Fisher with a single draw is
# already hard to distinguish from the exact one. EKFAC and KFAC see the same layers and nothing between them; ``foof``,
# which looks at inputs alone, repeats one block for every unit. In the neural tangent kernel the first species stands
# apart from the other two, which are known to be hard to separate; no label was used for it.

same(dense["residual"][25:, 25:], torch.zeros(D - 25, D - 25, dtype=torch.float64))
first_layer = dense["residual"][:20, :20].reshape(5, 4, 5, 4).abs().amax((1, 3))
same(first_layer, torch.diag(first_layer.diagonal()))

columns = 4
heights = [math.ceil(len(members) / columns) for members in groups.values()]
figure = plt.figure(figsize=(9.5, 2.55 * sum(heights)), layout="constrained")
parts = figure.subfigures(len(groups), 1, height_ratios=heights)
parameter_lines = [at.start - 0.5 for at in list(problem.layout.slices.values())[1:]]
output_lines = [6 * C * c - 0.5 for c in (1, 2)]
first_with_room = next(
    (i for i, members in enumerate(groups.values()) if len(members) % columns), 0
)
norm = SymLogNorm(linthresh=1e-3, linscale=0.4, vmin=-1, vmax=1, base=10)
for part, height, (title, members) in zip(parts, heights, groups.items(), strict=True):
    part.suptitle(title, x=0.01, ha="left", color="#0b3c5d", fontweight="bold")
    panels = part.subplots(height, columns, squeeze=False).ravel()
    for axes, name in zip(panels, members, strict=False):
        expr, matrix = registry.build(name), dense[name]
        picture = axes.imshow(
            (matrix / matrix.abs().max()).numpy(),
            norm=norm,
            cmap="RdBu_r",
            interpolation="nearest",
        )
        for space, line in ((expr.codomain, axes.axhline), (expr.domain, axes.axvline)):
            for at in parameter_lines if space == "parameters" else output_lines:
                line(at, color="#5b6470", linewidth=0.5)
        axes.set_title(name, fontsize=9)
        axes.set(xticks=[], yticks=[])
    for axes in panels[len(members) :]:
        axes.axis("off")
    if part is parts[first_with_room]:
        scale = part.colorbar(
            picture, ax=panels[-1], location="left", fraction=0.5, aspect=12, shrink=0.8
        )
        scale.set_label("entry / largest entry", fontsize=8)
        scale.set_ticks(
            [-1, -0.03, 0, 0.03, 1],
            labels=["−1", "−0.03", "0", "0.03", "1"],
            fontsize=8,
        )
plt.show()

# %%
# One matrix at a time
# --------------------
# :func:`~curvalg.estimate.heat_map` draws a single operator with the names of the parameters, here one that has no name of
# its own.

figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
mixed = (
    registry.build("hessian") - registry.build("centered_covariance") + 0.01 * Identity
)
heat_map(mixed.lower(problem), axes)
axes.set_title(str(mixed), color="#0b3c5d", fontsize=10)
plt.show()
