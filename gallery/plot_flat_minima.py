r"""
Flat minima by descending the top eigenvalue
============================================

After this page you can train a network for low loss and low curvature at once: the largest eigenvalue of the Hessian is added
to the loss like any other penalty,

.. math:: f(w) = L(w) + \mu \, \lambda_{\max}(H(w)), \qquad \nabla \lambda_{\max} = \nabla_w \, v^\top H(w) \, v,

with its eigenvector :math:`v`. The gradient is exact: :func:`curvalg.differentiable.top_eigenvalue` finds the pair, and one
pass in third-order reverse mode differentiates it.
"""

# %%
# A small network, twice
# ----------------------
# A hundred images of digits, shrunk to four by four pixels, and 172 weights, so that the network can learn them by heart. Only
# the penalty differs between the two trainings. The problem watches the parameters: after a step of the
# optimizer its numbers are those of where they are.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Problem, differentiable, registry
from curvalg.estimate import eigsh

images, labels = load_digits(return_X_y=True)
X = torch.tensor(images.reshape(-1, 4, 2, 4, 2).mean((2, 4)) / 16).reshape(-1, 16)
y = torch.tensor(labels)
train, test = slice(0, 100), slice(100, None)
loss, hessian = nn.CrossEntropyLoss(), registry.build("hessian")
STEPS = 120


def trained(penalty):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 10)).double()
    problem = Problem(model, loss, (X[train], y[train]), cache=0, columns=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    history = []
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        value = loss(model(X[train]), y[train])
        if penalty:
            (
                value + penalty * differentiable.top_eigenvalue(hessian, problem)
            ).backward()
        else:
            value.backward()
        if step % 10 == 0:
            top = float(eigsh(hessian.lower(problem), 1, which="LA").eigenvalues[0])
            history.append((step, float(value.detach()), top))
        if step < STEPS:
            optimizer.step()
    return problem, model, np.array(history)


runs = {"loss alone": trained(0), "with the penalty": trained(0.1)}

# %%
# Flat in every direction
# -----------------------
# Flatness means that the loss does not mind where exactly the weights are. Random directions, all of one length, are added to
# the weights; the loss of a quadratic model grows by half the trace of the Hessian divided by the number of weights, so that
# the trace falls with the eigenvalue, or nothing is gained. It does.

directions = torch.randn(
    20, runs["loss alone"][0].size, generator=torch.Generator().manual_seed(1)
).double()
directions /= directions.norm(dim=1, keepdim=True)
lengths = np.linspace(0, 3, 13)


def shaken(problem, model):
    """The mean loss at some distances from the minimum, over the directions."""
    found = []
    for length in lengths:
        for direction in directions:
            problem.step(direction, -length)
            found.append(problem.value())
            problem.step(direction, length)
    return np.array(found).reshape(len(lengths), -1).mean(1)


curves = {}
for name, (problem, model, history) in runs.items():
    with torch.no_grad():
        right = (model(X[train]).argmax(1) == y[train]).double().mean()
        new = float(loss(model(X[test]), y[test]))
    whole = float(hessian.lower(problem).exact("trace"))
    print(
        f"{name}: loss {history[-1, 1]:.4f}, {right:.0%} right, top eigenvalue "
        f"{history[-1, 2]:.3f}, trace {whole:.2f}"
    )
    print(f"{name}: loss on new images {new:.3f}")
    curves[name] = shaken(problem, model)
plain, flat = (history[-1] for _, _, history in runs.values())
assert flat[2] < plain[2] / 2
assert flat[1] < 0.1
rise = {name: curve[-1] - curve[0] for name, curve in curves.items()}
assert rise["with the penalty"] < 0.9 * rise["loss alone"]

# %%
# Left: the top eigenvalue while training. Middle: the loss, which the penalty slows down. Right: the loss around the two
# minima.

blue, red = "#0b3c5d", "#c8553d"
figure, panels = plt.subplots(1, 3, figsize=(9.5, 3.5), layout="constrained")
for (name, (_, _, history)), colour in zip(runs.items(), (blue, red), strict=True):
    steps, losses, tops = history.T
    panels[0].plot(steps, tops, color=colour, linewidth=2, label=name)
    panels[1].semilogy(steps, losses, color=colour, linewidth=2)
    panels[2].plot(lengths, curves[name], color=colour, linewidth=2)
titles = {
    "Top eigenvalue": "steps",
    "Training loss": "steps",
    "Loss around the minimum": "distance from the minimum",
}
for axes, (title, label) in zip(panels, titles.items(), strict=True):
    axes.set_title(title, loc="left", color=blue, fontsize=11)
    axes.set_xlabel(label)
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylim(bottom=0)
panels[0].legend(frameon=False)
plt.show()
