r"""
Exact products and differences of gradients
===========================================

After this page you know what a Hessian product by differences of gradients costs and errs, beside an exact one. The difference

.. math:: H v \approx \frac{\lVert v \rVert}{2 h} \bigl( \nabla L(\theta + h \hat v) - \nabla L(\theta - h \hat v) \bigr)

needs first derivatives alone, and is what is left where a model has no second backward pass. Its error has two parts: one of
order :math:`h^2` from the curvature's own change, and the rounding of gradients divided by :math:`h`.
"""

# %%
# One network in three precisions
# -------------------------------
# A small network for images of digits, at weights after a few steps of training. The truth is the exact product in
# float64.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Problem, registry

images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images[:600] / 16), torch.tensor(labels[:600])
loss = nn.CrossEntropyLoss()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()


trained = network()
optimizer = torch.optim.Adam(trained.parameters(), lr=0.01)
for _ in range(30):
    optimizer.zero_grad()
    loss(trained(X), y).backward()
    optimizer.step()


def problem(dtype):
    """The same weights rounded to a precision: what differs is the arithmetic."""
    model = network()
    model.load_state_dict(
        {k: t.bfloat16().double() for k, t in trained.state_dict().items()}
    )
    return Problem(model.to(dtype), loss, (X.bfloat16().to(dtype), y), verify=False)


hessian = registry.build("hessian")
exact = problem(torch.float64)
v = torch.randn(
    exact.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
)
truth = hessian.lower(exact) @ v


def error(product):
    return float((product.double() - truth).norm() / truth.norm())


# %%
# The error over the step
# -----------------------
# With ``tol=None`` nothing is refused. Steps are in units of :math:`\lVert \theta \rVert`.

steps = np.logspace(-7, -0.5, 27)
curves, lines = {}, {}
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    own = problem(dtype)
    u = v.to(own.dtype)
    curves[dtype] = [
        error(registry.build("hessian_fd", step=float(h), tol=None).lower(own) @ u)
        for h in steps
    ]
    lines[dtype] = error(hessian.lower(own) @ u)

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
names = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16"}
for color, (dtype, errors) in zip(("C0", "C1", "C3"), curves.items(), strict=True):
    axes.loglog(
        steps, errors, "o-", ms=3, color=color, label=f"differences, {names[dtype]}"
    )
    if dtype != torch.float64:
        axes.axhline(
            lines[dtype], color=color, ls="--", label=f"exact product, {names[dtype]}"
        )
axes.set(
    xlabel="step h / ‖θ‖", ylabel="relative error of the product", ylim=(1e-11, 1e3)
)
axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()

# %%
# To the left rounding grows as :math:`1 / h`, to the right the other part as :math:`h^2`. The best step depends on
# precision, model and vector. At its best a difference is much less accurate than the exact product in the same
# precision, and in bfloat16, where the weights themselves are rounded to three digits, so that the two ends of a short
# step are the same weights, no step gives two digits.

best = {dtype: min(errors) for dtype, errors in curves.items()}
for dtype in (torch.float32, torch.bfloat16):
    print(
        f"{names[dtype]}: best difference {best[dtype]:.1e}, exact product "
        f"{lines[dtype]:.1e}"
    )
    assert lines[dtype] < best[dtype] / 3
assert best[torch.float64] < 1e-6

# %%
# A step that is found, and an error that is said
# -----------------------------------------------
# Without ``step=`` the step is found from the measured noise of the gradient. Each product is estimated by two steps and
# refused where its error may be above one per cent.

op = registry.build("hessian_fd").lower(problem(torch.float32))
found = error(op @ v.float())
print(f"error {found:.1e}")
print(op.explain())
assert found < 0.01

# %%
# Where there is a second backward pass, the exact product costs less, too: about as much as two gradients once its graph
# is kept, where the difference takes four with its estimate, or two without.
