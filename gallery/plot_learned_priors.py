r"""
One prior for each layer, learned from the training data
========================================================

After this page you can learn the strength of weight decay, one for each layer, by gradient descent and without validation
data. A Gaussian prior of precision :math:`\delta_l` on the weights of layer :math:`l` is a weight decay, and Laplace's
approximation of the evidence says how probable it makes the data (MacKay, Neural Computation 1992; Immer et al., arXiv
2104.04975):

.. math:: -\log p(y \mid \delta) \approx L(\hat w) + \sum_l \left( \tfrac{\delta_l}{2} \lVert \hat w_l \rVert^2
          - \tfrac{D_l}{2} \log \delta_l \right) + \tfrac{1}{2} \log \det (G + \operatorname{diag} \delta),

with the Gauss-Newton matrix :math:`G` of the negative log likelihood :math:`L` at the most probable weights :math:`\hat w`.
:func:`curvalg.differentiable.logdet` is a tensor with gradients, to the priors and to the weights.
"""

# %%
# A network with little data
# --------------------------
# A hundred images of digits, shrunk to four by four pixels, for 226 weights. Fourteen hundred others test what was learned, and
# have no part in choosing anything.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Diagonal, Problem, differentiable, inverse, registry

images, labels = load_digits(return_X_y=True)
X = torch.tensor(images.reshape(-1, 4, 2, 4, 2).mean((2, 4)) / 16).reshape(-1, 16)
y = torch.tensor(labels)
train, test = slice(0, 100), slice(397, None)
loss = nn.CrossEntropyLoss(reduction="sum")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10)).double()
problem = Problem(model, loss, (X[train], y[train]), cache=0, columns=64)
ggn, hessian = registry.build("ggn"), registry.build("hessian")
LAYERS = {name: name.split(".")[0] for name in problem.layout.names}
start = {name: p.detach().clone() for name, p in model.state_dict().items()}


def per_parameter(logarithms):
    """Priors by the names of parameters, from logarithms by layer."""
    return {name: logarithms[layer].exp() for name, layer in LAYERS.items()}


def fit(prior):
    """Move to the most probable weights under a prior."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=200,
        tolerance_grad=1e-4,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def objective():
        optimizer.zero_grad()
        decay = sum(
            prior[name].detach() / 2 * p.square().sum()
            for name, p in model.named_parameters()
        )
        value = loss(model(X[train]), y[train]) + decay
        value.backward()
        return value

    optimizer.step(objective)
    optimizer.zero_grad()


def evidence(prior):
    """Minus the log evidence at the present weights, and the log-determinant in it."""
    logdet = differentiable.logdet(ggn, problem, damping=prior)
    terms = [
        prior[name] / 2 * p.detach().square().sum() - p.numel() / 2 * prior[name].log()
        for name, p in model.named_parameters()
    ]
    return problem.value() + sum(terms) + logdet / 2


def tested():
    with torch.no_grad():
        output = model(X[test])
        return float(nn.functional.cross_entropy(output, y[test])), float(
            (output.argmax(1) == y[test]).double().mean()
        )


# %%
# One prior for all, by a grid
# ----------------------------
# Seven trainings, each from the same start.

grid = 10 ** np.linspace(-2.5, 0.5, 7)
on_grid = []
for precision in grid:
    model.load_state_dict(start)
    prior = dict.fromkeys(LAYERS, torch.tensor(precision))
    fit(prior)
    on_grid.append((float(evidence(prior).detach()), *tested()))
on_grid = np.array(on_grid)
best = int(on_grid[:, 0].argmin())
print(
    f"best of the grid: prior {grid[best]:.3f}, evidence {-on_grid[best, 0]:.2f}, test "
    f"loss {on_grid[best, 1]:.3f}"
)

# %%
# One prior for each layer, by gradients
# --------------------------------------
# A prior acts on the evidence directly, and by moving the weights :math:`\hat w`, on which the determinant depends. At a
# minimiser only the determinant can feel that: with :math:`g = \tfrac{1}{2} \nabla_w \log \det` and the Hessian :math:`H` of
# the loss,
#
# .. math:: \frac{d}{d \log \delta_l} = \frac{\partial}{\partial \log \delta_l}
#           - \delta_l \, \hat w_l^\top \left[ (H + \operatorname{diag} \delta)^{-1} g \right]_l.
#
# One call of ``backward`` gives the first part and :math:`g`, one solve the second. The second is usually left out. Here both
# are tried.


def learned(steps, whole):
    model.load_state_dict(start)
    logarithms = {
        layer: torch.zeros((), dtype=torch.float64, requires_grad=True)
        for layer in set(LAYERS.values())
    }
    optimizer = torch.optim.Adam(logarithms.values(), lr=0.35)
    history = []
    for _ in range(steps):
        fit(per_parameter(logarithms))
        optimizer.zero_grad()
        value = evidence(prior := per_parameter(logarithms))
        value.backward()
        history.append(
            (
                float(value.detach()),
                *tested(),
                *(float(logarithms[at].detach().exp()) for at in ("0", "2")),
            )
        )
        if whole:
            g = problem.layout.flatten(
                {name: p.grad for name, p in model.named_parameters()}
            )
            spread = torch.cat(
                [
                    prior[name].detach().expand(p.numel())
                    for name, p in model.named_parameters()
                ]
            )
            moved = problem.layout.unflatten(
                inverse(hessian + Diagonal(spread)).lower(problem) @ g
            )
            for name, p in model.named_parameters():
                logarithms[LAYERS[name]].grad -= (
                    prior[name] * (p * moved[name]).sum()
                ).detach()
        optimizer.step()
    return np.array(history)


runs = {
    "whole gradient": learned(18, whole=True),
    "weights held": learned(18, whole=False),
}
for name, history in runs.items():
    value, tested_loss, accuracy, first, second = history[-1]
    print(
        f"{name}: priors {first:.3f} and {second:.3f}, evidence {-value:.2f}, test "
        f"loss {tested_loss:.3f}, {accuracy:.1%}"
    )

# %%
# The evidence that the whole gradient reaches is above that of every single prior. With the weights held the descent walks
# past the best priors and goes on, to an evidence below where it was before: the determinant resists, but only by way of the
# weights. (Of new images such a network happens to be less unsure: the evidence is a guide to what the training data can tell,
# not the loss on a test set.)

reached = {name: history[:, 0] for name, history in runs.items()}
assert reached["whole gradient"][-1] < on_grid[best, 0] - 1
assert reached["whole gradient"][-1] < reached["whole gradient"].min() + 1
assert reached["weights held"][-1] > reached["weights held"].min() + 3
assert runs["whole gradient"][-1, 3] > 2 * runs["whole gradient"][-1, 4]
assert runs["whole gradient"][-1, 1] < on_grid[best, 1] + 0.05

# %%
# Left: the evidence along both ways. Middle: the priors; the first layer is held several times as tightly as the second, which
# no single prior can do. Right: the grid.

blue, red, grey = "#0b3c5d", "#c8553d", "#9aa3ad"
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(9.5, 3.6), layout="constrained"
)
left.axhline(-on_grid[best, 0], color=grey, linewidth=1.6, label="best single prior")
for (name, history), colour in zip(runs.items(), (red, blue), strict=True):
    left.plot(-history[:, 0], color=colour, linewidth=2, label=name)
    middle.semilogy(
        history[:, 3], color=colour, linewidth=2, label=f"first layer, {name}"
    )
    middle.semilogy(
        history[:, 4], "--", color=colour, linewidth=2, label=f"second layer, {name}"
    )
left.set(xlabel="steps", ylim=(-on_grid[best, 0] - 35, -on_grid[best, 0] + 8))
left.set_title("Evidence", loc="left", color=blue)
middle.set(xlabel="steps", ylim=(5e-3, 90))
middle.set_title("Priors", loc="left", color=blue)
right.semilogx(
    grid, -on_grid[:, 0], "o-", color=grey, linewidth=1.6, label="single priors"
)
right.axhline(
    -reached["whole gradient"][-1], color=red, linewidth=2, label="one for each layer"
)
right.set_xlabel("prior precision")
right.set_title("Evidence of single priors", loc="left", color=blue)
for axes in (left, middle, right):
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
plt.show()
