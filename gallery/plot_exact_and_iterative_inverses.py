"""
Exact and iterative inverses
============================

Second-order optimisers, Laplace approximations and influence functions solve systems with a damped curvature matrix. Where
the matrix has structure, curvalg solves them exactly; where it has none, by conjugate gradients, which a structured
approximation speeds up. This page solves one system in all these ways, and lets ``explain`` say why each was chosen.
"""

# %%
# The system
# ----------
# A small network on handwritten digits, stopped early. The right-hand side is the gradient, so the solution is a
# Gauss-Newton step. The damping is 10⁻⁵ of the largest eigenvalue: without it the matrix has no inverse, and with so
# little of it plain conjugate gradients are slow.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Identity, Problem, block_diagonal, inverse, nystrom, registry

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)

model = nn.Sequential(
    nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
)
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(3):
    for rows in torch.randperm(len(X)).split(64):
        optimizer.zero_grad()
        loss(model(X[rows]), y[rows]).backward()
        optimizer.step()

problem = Problem(model, loss, (X[:150], y[:150]))
ggn = registry.build("ggn")
gradient = problem.gradient()

# %%
# Exact, through the Gram matrix
# ------------------------------
# The GGN of 150 images and ten classes has rank at most 150 · 9 = 1350, fewer than the 8970 parameters:
# :math:`G = V V^\top`. Everything about it follows from the small matrix :math:`V^\top V`: all eigenvalues, and the
# inverse for any damping.

spectrum = ggn.lower(problem).exact("eigh")
print(
    f"{len(spectrum.eigenvalues)} eigenvalues above rounding, {spectrum.multiplicity} "
    "zeros"
)
damping = 1e-5 * float(spectrum.eigenvalues[-1])
damped = ggn + damping * Identity

exact = inverse(damped, rtol=1e-4).lower(problem)
step = exact @ gradient
print(exact.explain())

residual = (damped.lower(problem) @ step - gradient).norm() / gradient.norm()
print(f"relative residual {residual:.1e}")
assert residual < 1e-4
assert exact.last_solve.iterations.max() == 0

# %%
# Iterative, with and without a preconditioner
# --------------------------------------------
# Any approximation with a structured inverse preconditions. ``nystrom`` multiplies the matrix with a few random vectors
# and keeps what it saw of the largest eigenvalues; ``block_diagonal`` keeps the coupling inside each layer.

preconditioners = {
    "none": None,
    "block-diagonal": block_diagonal(damped, by="module"),
    "Nyström, rank 100": nystrom(ggn, 100) + damping * Identity,
    "Nyström, rank 400": nystrom(ggn, 400) + damping * Identity,
}
tolerances = (1e-1, 1e-2, 1e-3, 1e-4)
iterations = {}
for label, preconditioner in preconditioners.items():
    iterations[label] = []
    for rtol in tolerances:
        op = inverse(
            damped, solver="cg", rtol=rtol, preconditioner=preconditioner
        ).lower(problem)
        result = op.solve(gradient)
        assert result.converged.all()
        iterations[label].append(int(result.iterations))
    print(f"{label:18} {iterations[label]} iterations to residuals of {tolerances}")

assert iterations["Nyström, rank 400"][-1] <= iterations["none"][-1] / 5

# %%
# They agree where they must: the iterative step, at the tightest tolerance, is the exact one.

difference = (op @ gradient - step).norm() / step.norm()
print(f"relative difference of the steps {difference:.1e}")

# %%
# What it costs
# -------------
# The preconditioner pays twice: fewer products, and a predictable number of them.

colours = {
    "none": "#9aa3ad",
    "block-diagonal": "#c8553d",
    "Nyström, rank 100": "#5b8db8",
    "Nyström, rank 400": "#0b3c5d",
}
figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
for label, counts in iterations.items():
    axes.plot(
        counts, tolerances, "o-", color=colours[label], label=label, linewidth=1.5
    )
axes.set_xscale("log")
axes.set_yscale("log")
axes.set_xlabel("products with the matrix")
axes.set_ylabel("relative residual reached")
axes.set_title(
    "Preconditioned conjugate gradients on a damped GGN", loc="left", color="#0b3c5d"
)
axes.grid(color="#e3e5e8")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, title="preconditioner")
plt.show()
