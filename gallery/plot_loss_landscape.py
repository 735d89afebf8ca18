r"""
The loss landscape along top eigenvectors
=========================================

After this page you can draw the loss of a network on a plane through its parameters that means something, know what the
curvatures in the picture are, and see why a plane of random directions shows almost nothing. On the plane of two unit
eigenvectors :math:`v_1, v_2` of the Hessian,

.. math:: L(w + a v_1 + b v_2) = L(w) + a \, g^\top v_1 + b \, g^\top v_2
          + \tfrac{1}{2} (\lambda_1 a^2 + \lambda_2 b^2) + \dots

without a mixed term: the axes of the picture are those of the ellipses in it.
"""

# %%
# A trained network
# -----------------
# A small convolutional network on five hundred images of handwritten digits.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Problem, registry
from curvalg.estimate import eigsh, trace

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X = torch.tensor(images[:500] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
y = torch.tensor(labels[:500])
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
for _ in range(25):
    for rows in torch.randperm(len(X)).split(50):
        optimizer.zero_grad()
        loss(model(X[rows]), y[rows]).backward()
        optimizer.step()

model, X = model.double(), X.double()
problem = Problem(model, loss, (X, y))
hessian = registry.build("hessian").lower(problem)
print(problem, f"loss {problem.value():.3f}")

# %%
# Directions
# ----------
# The two largest eigenvalues and the smallest, with unit eigenvectors; and two random unit vectors, orthogonal to each
# other.

top = eigsh(hessian, 2, which="LA", tol=1e-9)
low = eigsh(hessian, 1, which="SA", tol=1e-7)
random = torch.linalg.qr(
    torch.randn(
        problem.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
).Q
first, second, lowest = (
    top.eigenvectors[:, 1],
    top.eigenvectors[:, 0],
    low.eigenvectors[:, 0],
)
values = {
    "first": float(top.eigenvalues[1]),
    "second": float(top.eigenvalues[0]),
    "lowest": float(low.eigenvalues[0]),
}
print(", ".join(f"{name} eigenvalue {value:.4f}" for name, value in values.items()))

# %%
# The loss on a plane
# -------------------
# ``layout.unflatten`` turns a vector into parameters; with ``torch.func`` many points are computed in one call.


def loss_at(points):
    """The loss at points (P, D) of parameter space."""

    def one(point):
        return loss(
            torch.func.functional_call(model, problem.layout.unflatten(point), X), y
        )

    with torch.no_grad():
        return torch.vmap(one, chunk_size=50)(points)


centre = problem.layout.flatten(
    {name: p.detach() for name, p in model.named_parameters()}
)
reach = torch.linspace(-1, 1, 31, dtype=torch.float64)


def plane(across, upwards, scale):
    a, b = torch.meshgrid(scale * reach, scale * reach, indexing="xy")
    points = centre + a.reshape(-1, 1) * across + b.reshape(-1, 1) * upwards
    return loss_at(points).reshape(a.shape)


# %%
# The curvatures of the picture are the eigenvalues
# -------------------------------------------------
# Nothing in the picture knows of Hessians; differences of losses along its axes must give the eigenvalues, and across the
# diagonal nothing. The differences are of fourth order in the distance :math:`h`.


def second_difference(u, h=0.02):
    at = loss_at(
        centre + torch.tensor([-2, -1, 0, 1, 2], dtype=torch.float64)[:, None] * h * u
    )
    return float(at @ torch.tensor([-1.0, 16, -30, 16, -1], dtype=torch.float64)) / (
        12 * h * h
    )


for name, u in (("first", first), ("second", second), ("lowest", lowest)):
    print(
        f"{name}: curvature of the loss {second_difference(u):.7f}, eigenvalue "
        f"{values[name]:.7f}"
    )
    assert abs(second_difference(u) - values[name]) < 1e-4 * values["first"]
mixed = second_difference((first + second) / 2**0.5) - second_difference(
    (first - second) / 2**0.5
)
print(f"mixed derivative {mixed / 2:.1e}")
assert abs(mixed / 2) < 1e-4 * values["first"]
errors = [second_difference(first, h) - values["first"] for h in (0.04, 0.02)]
print(f"halving h divides the error by {errors[0] / errors[1]:.1f}")
assert 14 < errors[0] / errors[1] < 18

# %%
# Random directions
# -----------------
# A random unit vector :math:`u` has :math:`\mathbb{E} \, u^\top H u = \operatorname{tr} H / D`, the mean of all eigenvalues.
# Most of them are near zero, so that mean is more than a hundred times smaller than the largest.

U = torch.nn.functional.normalize(
    torch.randn(
        problem.size,
        200,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(2),
    ),
    dim=0,
)
curvatures = (U * (hessian @ U)).sum(0)
total = trace(hessian, products=120)
spread = float(curvatures.std()) / len(curvatures) ** 0.5
print(
    f"curvature along random directions {float(curvatures.mean()):.4f} ± {spread:.4f}"
)
print(
    f"trace / D = {total.value / problem.size:.4f} ± {total.error / problem.size:.4f}"
)
assert abs(float(curvatures.mean()) - total.value / problem.size) < 4 * np.hypot(
    spread, total.error / problem.size
)
assert values["first"] > 100 * curvatures.mean()

# %%
# Three planes
# ------------
# All three have the same extent, colours and contours. Dashed on the left are contours of the quadratic model, whose ellipses
# lie along the axes. Near the centre the loss follows them, further out it grows more slowly. In the middle the loss is a
# trench: along the smallest eigenvalue it hardly changes. On the right there is next to nothing to see, and the picture would
# be as empty for any other trained network of this size.

planes = {
    "two largest eigenvalues": (first, second),
    "largest and smallest eigenvalue": (first, lowest),
    "two random directions": (random[:, 0], random[:, 1]),
}
surfaces = {name: plane(*directions, 1.0) for name, directions in planes.items()}
everywhere = torch.stack(list(surfaces.values()))
lowest_loss, highest_loss = float(everywhere.min()), float(everywhere.max())
levels = np.geomspace(lowest_loss, highest_loss, 18)
gradient = problem.gradient()
a, b = torch.meshgrid(reach, reach, indexing="xy")
model_loss = problem.value() + a * (gradient @ first) + b * (gradient @ second)
model_loss = model_loss + (values["first"] * a**2 + values["second"] * b**2) / 2
ranges = {name: float(s.max() - s.min()) for name, s in surfaces.items()}
for name, value in ranges.items():
    print(f"{name:32} loss varies by {value:.3f}")
assert ranges["two largest eigenvalues"] > 20 * ranges["two random directions"]

axis_names = {
    "two largest eigenvalues": (
        f"a, λ = {values['first']:.2f}",
        f"b, λ = {values['second']:.2f}",
    ),
    "largest and smallest eigenvalue": (
        f"a, λ = {values['first']:.2f}",
        f"b, λ = −{-values['lowest']:.3f}",
    ),
    "two random directions": ("a", "b"),
}
figure, panels = plt.subplots(1, 3, figsize=(9.5, 3.5), layout="constrained")
for axes, (name, surface) in zip(panels, surfaces.items(), strict=True):
    grid = reach.numpy()
    filled = axes.contourf(
        grid, grid, surface.numpy(), levels, norm="log", cmap="Blues_r"
    )
    axes.contour(grid, grid, surface.numpy(), levels, colors="#0b3c5d", linewidths=0.6)
    if name == "two largest eigenvalues":
        axes.contour(
            grid,
            grid,
            model_loss.numpy(),
            levels[1::3],
            colors="#c8553d",
            linewidths=1.2,
            linestyles="--",
        )
        axes.plot([], [], "--", color="#c8553d", label="quadratic model")
        axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    axes.plot(0, 0, "+", color="#c8553d", markersize=9, markeredgewidth=2)
    axes.set(
        xlabel=axis_names[name][0],
        ylabel=axis_names[name][1],
        aspect="equal",
        xticks=(-1, 0, 1),
        yticks=(-1, 0, 1),
    )
    axes.set_title(name, fontsize=10, color="#0b3c5d", loc="left")
scale = figure.colorbar(
    filled, ax=panels, label="mean loss", location="right", shrink=0.9
)
ticks = [
    t for t in (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5) if lowest_loss <= t <= highest_loss
]
scale.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
scale.ax.minorticks_off()
plt.show()
