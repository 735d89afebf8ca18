"""
First products with a curvature matrix
======================================

The curvature of a network's loss is a matrix with one row and one column per parameter: too large to store, but its
products with vectors cost little more than gradients. This page builds such a matrix as an expression, binds it to a
small classifier of handwritten digits, multiplies it with vectors of three kinds, checks it against a dense matrix, and
hands it to SciPy's eigensolver.
"""

# %%
# Data and model
# --------------
# The digits come with scikit-learn: 1797 grey images of 8 x 8 pixels in ten classes. A few epochs of Adam suffice.

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Identity, Problem, parse, registry, restrict

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X = torch.tensor(images / 16, dtype=torch.float32)
y = torch.tensor(labels)

model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(5):
    for rows in torch.randperm(len(X)).split(64):
        optimizer.zero_grad()
        loss(model(X[rows]), y[rows]).backward()
        optimizer.step()

# %%
# An expression
# -------------
# Matrices have names. ``ggn`` is the generalised Gauss-Newton matrix :math:`\sum_n J_n^\top B_n J_n`, the part of the
# Hessian that the curvature of the loss contributes. Expressions combine like matrices and know neither model nor data.

ggn = registry.build("ggn")
damped = ggn + 1e-3 * Identity
print(damped)

# %%
# What is printed can be read back, which is how the command line takes expressions.

assert parse(str(damped)) == damped
print(damped.tree())

# %%
# A problem
# ---------
# A problem is a model, a loss, data and parameters. The data may be cut into batches in any way: what is computed is
# always the curvature of the loss over all of it.

batches = list(zip(X.split(600), y.split(600), strict=True))
problem = Problem(model, loss, batches)
print(problem)
print(f"loss {problem.value():.4f}, gradient norm {problem.gradient().norm():.4f}")

# %%
# An operator
# -----------
# Lowering the expression on the problem gives a SciPy ``LinearOperator`` that torch computes. It takes NumPy arrays,
# torch tensors, or dicts with one tensor per parameter, and gives back the same kind.

op = damped.lower(problem)
print(op)

v = torch.randn(problem.size, generator=torch.Generator().manual_seed(1))
from_torch = op @ v
from_numpy = op @ v.numpy()
from_dict = op @ problem.layout.unflatten(v)

print(
    type(from_torch).__name__,
    type(from_numpy).__name__,
    {name: tuple(t.shape) for name, t in from_dict.items()},
)
np.testing.assert_allclose(from_numpy, from_torch.numpy(), rtol=1e-5, atol=1e-6)
torch.testing.assert_close(problem.layout.flatten(from_dict), from_torch)

# %%
# Several columns are multiplied in one call.

V = torch.randn(problem.size, 3, generator=torch.Generator().manual_seed(2))
torch.testing.assert_close((op @ V)[:, 1], op @ V[:, 1], rtol=1e-4, atol=1e-5)

# %%
# Is it the right matrix?
# -----------------------
# Over the ten biases of the last layer the matrix is small, and known in closed form: the outputs :math:`z_n` depend on
# them by the identity, so the GGN is the mean of :math:`\operatorname{diag}(p_n) - p_n p_n^\top` over the data, with
# the predicted probabilities :math:`p_n`.

small = restrict(ggn, "2.bias").lower(problem)
with torch.no_grad():
    p = model(X).softmax(1)
closed_form = torch.diag(p.mean(0)) - p.T @ p / len(p)
torch.testing.assert_close(small.to_dense(), closed_form, rtol=1e-4, atol=1e-6)
print(f"largest difference {(small.to_dense() - closed_form).abs().max():.1e}")

# %%
# A dense matrix of the last layer's 330 parameters still fits. Its eigenvalues agree with those that SciPy finds from
# products alone.

layer = restrict(ggn, "2.*").lower(problem)
dense = np.linalg.eigvalsh(layer.to_dense().double().numpy())
iterative = eigsh(
    layer,
    k=5,
    return_eigenvectors=False,
    v0=np.linspace(-1, 1, layer.shape[0], dtype=layer.dtype),
)
np.testing.assert_allclose(np.sort(iterative), dense[-5:], rtol=1e-4)

# %%
# What was done
# -------------
# ``explain`` says what the expression became on this problem: what was simplified, what one product does, and what is
# known of the matrix.

print(op.explain())

# %%
# The spectrum
# ------------
# With ten classes, nine eigenvalues of the GGN stand clear of the rest, one less than there are classes. The Hessian
# adds the curvature of the network itself: its largest eigenvalues follow those of the GGN, and the step after the
# ninth is smaller.

start = np.random.default_rng(0).standard_normal(problem.size).astype(np.float32)
top = {}
for name in ("ggn", "hessian"):
    values = eigsh(
        registry.build(name).lower(problem),
        k=20,
        which="LA",
        v0=start,
        tol=1e-3,
        return_eigenvectors=False,
    )
    top[name] = np.sort(values)[::-1]

ink, accent = "#0b3c5d", "#c8553d"
figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
number = np.arange(1, 21)
axes.axvspan(0.4, 9.5, color="#eef2f5", zorder=0)
axes.text(
    9.3,
    0.96,
    "C − 1 = 9",
    transform=axes.get_xaxis_transform(),
    ha="right",
    va="top",
    color="#5b6470",
)
axes.plot(number, top["ggn"], "o-", color=ink, linewidth=1, markersize=8, label="GGN")
axes.plot(
    number,
    top["hessian"],
    "D--",
    color=accent,
    linewidth=1,
    markersize=5,
    label="Hessian",
)
axes.set_yscale("log")
axes.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
axes.set_xlim(0.4, 20.6)
axes.set_xticks([1, 5, 10, 15, 20])
axes.set_xlabel("eigenvalue number")
axes.set_ylabel("eigenvalue")
axes.set_title(
    "Nine eigenvalues stand clear in a ten-class network", loc="left", color=ink
)
axes.grid(axis="y", color="#e3e5e8")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
plt.show()
