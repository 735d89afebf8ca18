r"""
The spectral density and its outliers
=====================================

After this page you can draw the whole spectrum of a Hessian without its matrix, with an error band; compute the eigenvalues
that stand out one by one; count the others in an interval with a standard error; and take the trace and the effective
dimension of the same matrix. The network is small enough to compare everything with all its eigenvalues.
"""

# %%
# Data and model
# --------------
# A network with one hidden layer on images of handwritten digits, trained for thirty epochs.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Problem, registry
from curvalg.estimate import effective_dimension, spectral_density, trace

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images[:600] / 16, dtype=torch.float32), torch.tensor(labels[:600])
X = X - X.mean(0)

model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(30):
    for rows in torch.randperm(len(X)).split(50):
        optimizer.zero_grad()
        loss(model(X[rows]), y[rows]).backward()
        optimizer.step()

problem = Problem(model.double(), loss, (X.double(), y))
hessian, ggn = (
    registry.build("hessian").lower(problem),
    registry.build("ggn").lower(problem),
)
print(problem)

# %%
# Stochastic Lanczos quadrature
# -----------------------------
# :math:`M` steps of Lanczos from a random vector give Ritz values :math:`\theta_j` and weights :math:`\tau_j^2`: the nodes
# and weights of a quadrature rule for :math:`D^{-1} \sum_i f(\lambda_i)`, exact in expectation for all polynomials of
# degree up to :math:`2 M - 1`. With :math:`k` such vectors and a bump of width :math:`\sigma` for each node,
#
# .. math:: \varphi(\lambda) = \frac{1}{k} \sum_{\text{probes}} \sum_j \tau_j^2 \,
#           \mathcal{N}(\lambda; \theta_j, \sigma^2) .
#
# The probes advance together, so a step is one product with :math:`k` columns. Ten eigenvalues or so stand far out in such
# spectra, about as many as there are classes. ``outliers=`` computes them one by one and takes them out of the probes,
# which then have only the bulk to resolve.

plain = spectral_density(hessian, probes=10, steps=50)
density = spectral_density(hessian, probes=10, steps=50, outliers=12)
logarithmic = spectral_density(hessian, probes=10, steps=50, outliers=12, scale="log")
longer = spectral_density(hessian, probes=10, steps=100, outliers=12, scale="log")
for made in (plain, density, logarithmic, longer):
    print(
        f"{made.scale}: {made.products} products, {made.seconds:.1f} s, bumps of width "
        f"{made.width:.2g}"
    )

# %%
# The exact eigenvalues, for comparison.

exact = torch.linalg.eigvalsh(hessian.to_dense())
largest = exact[exact.abs().argsort()[-12:]].sort().values
print("outliers", " ".join(f"{float(value):.3f}" for value in density.outliers))
torch.testing.assert_close(density.outliers, largest, rtol=1e-6, atol=0)

# %%
# The width of the bumps follows the range that the nodes have to cover. Without the twelve largest eigenvalues the range is
# several times shorter, and so are the bumps.

assert density.width < plain.width / 3

# %%
# Linear and logarithmic
# ----------------------
# On a linear axis more than half of the eigenvalues are in one peak at zero. The logarithmic one shows the density of
# :math:`\log_{10} (|\lambda| + \epsilon)`, and beside it the share of negative eigenvalues. The bars are the histogram of
# the exact eigenvalues.

grey, blue, red, yellow = "#d5dae0", "#0b3c5d", "#c8553d", "#d9a441"
true = exact.numpy()
figure, panels = plt.subplots(2, 1, figsize=(9.5, 7.4), layout="constrained")


def peak(made):
    return 1 / (made.size * made.width * np.sqrt(2 * np.pi))


def curve(axes, made, colour, label):
    axes.plot(made.grid, made.density, color=colour, linewidth=1.3, label=label)
    axes.fill_between(
        made.grid, made.lower, made.upper, color=colour, alpha=0.3, linewidth=0
    )


edges = np.arange(-0.01, 0.2, 4 * density.width)
heights = np.histogram(true, edges)[0] / len(true) / np.diff(edges)
panels[0].stairs(heights, edges, fill=True, color=grey, label="exact eigenvalues")
curve(panels[0], density, blue, "50 steps, ± standard error")
panels[0].plot(
    density.outliers,
    [1.6 * peak(density)] * 12,
    "v",
    color=red,
    markersize=5,
    label="outliers",
)
panels[0].set(
    xlabel="λ", ylabel="density", xlim=(-0.01, 0.19), ylim=(peak(density) / 8, 4e3)
)

shifted = np.log10(np.abs(true) + logarithmic.floor)
edges = np.arange(shifted.min() - 0.05, shifted.max() + 0.15, 0.1)
heights = np.histogram(shifted, edges)[0] / len(true) / np.diff(edges)
panels[1].stairs(heights, 10**edges, fill=True, color=grey)
curve(panels[1], logarithmic, blue, "50 steps")
curve(panels[1], longer, red, "100 steps")
panels[1].plot(
    longer.grid,
    longer.negative,
    ":",
    color=yellow,
    linewidth=2,
    label="of λ < 0, 100 steps",
)
panels[1].set(
    xlabel="|λ| + ε",
    ylabel="density per decade",
    xscale="log",
    xlim=(2e-7, 0.4),
    ylim=(4e-3, 9),
)

titles = ("Hessian, linear scale", "Hessian, logarithmic scale")
for axes, title, place in zip(
    panels, titles, ("upper right", "upper center"), strict=True
):
    axes.set(yscale="log")
    axes.set_title(title, loc="left", color=blue)
    axes.legend(frameon=False, loc=place)
    axes.grid(axis="y", color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# From the largest eigenvalues down to the middle of the bulk the curve follows the histogram. Below, it does not: all
# eigenvalues nearer to zero than the nodes of Lanczos lie to each other, exact zeros among them, are gathered in one bump,
# and more steps only move the place where that begins. Where the logarithmic curve has its lowest bump is a property of the
# method, not of the matrix, and neither the band nor a narrower ``width`` shows it; a curve with twice the steps does.

at = np.geomspace(3e-3, 2e-2, 50)
short, twice = (
    np.interp(at, made.grid, made.density) for made in (logarithmic, longer)
)
assert np.abs(short / twice - 1).max() < 0.15
lowest = [float(made.grid[made.density.argmax()]) for made in (logarithmic, longer)]
print(f"highest bump at {lowest[0]:.0e} with 50 steps, at {lowest[1]:.0e} with 100")
assert lowest[1] < 0.8 * lowest[0]

# %%
# A band of one standard error over the probes shows how much the curve would move with other probes. It does not know of
# the smoothing: bumps, like the bars of a histogram, hide what is narrower than they are.

assert (density.lower <= density.density).all()
assert (density.density <= density.upper).all()
area = float(torch.trapezoid(density.density, density.grid))
assert abs(area - 1) < 1e-3

# %%
# Counting
# --------
# ``count(a, b)`` sums the weights of the nodes in an interval, without the bumps, and adds the outliers in it exactly. Its
# error is one standard error over the probes plus the difference to rules of fewer steps. A single node stands for hundreds
# of eigenvalues near zero and for one in the tail, so a bound at the edge of the peak costs many more counts than one in a
# gap.

end = 2 * float(density.outliers[-1])
intervals = {
    "negative": (-end, -5e-4),
    "peak at zero": (-5e-4, 5e-4),
    "bulk": (1e-3, 1e-2),
    "tail": (1e-2, end),
    "far tail": (3e-2, end),
}
for name, (a, b) in intervals.items():
    counted, known = density.count(a, b), int(((true >= a) & (true <= b)).sum())
    print(f"{name:12} {counted.value:6.1f} ± {counted.error:4.1f}, exactly {known}")
    assert abs(counted.value - known) < 4 * counted.error
assert density.count(3e-2, end).error < 2 < density.count(-5e-4, 5e-4).error

# %%
# Trace and effective dimension
# -----------------------------
# The trace of the Hessian, and of the GGN the number of directions that stand out from a damping,
# :math:`\operatorname{tr} G (G + \lambda I)^{-1}`, which asks for a positive semi-definite matrix. Both come with errors.
# Test vectors that are projected onto the range of the matrix (XTrace) give the trace more closely than the nodes of the
# density do, for a quarter of the products.

total = trace(hessian, products=150)
print(
    f"trace {total.value:.3f} ± {total.error:.3f} ({total.method}, {total.products} "
    f"products), exactly {true.sum():.3f}"
)
assert abs(total.value - true.sum()) < 4 * total.error

means = problem.size * (density.nodes * density.weights).sum(1) + density.outliers.sum()
from_nodes = float(means.std() / len(means) ** 0.5)
print(
    f"trace {float(means.mean()):.3f} ± {from_nodes:.3f} from the nodes of the density "
    f"({density.products} products)"
)
assert total.error < from_nodes

spectrum = torch.linalg.eigvalsh(ggn.to_dense())
for damping in (1e-2, 1e-3, 1e-4):
    dimension, known = (
        effective_dimension(ggn, damping),
        float((spectrum / (spectrum + damping)).sum()),
    )
    print(
        f"damping {damping:.0e}: effective dimension {dimension.value:.1f} ± "
        f"{dimension.error:.1f}, exactly {known:.1f}"
    )
    assert abs(dimension.value - known) < 4 * dimension.error
