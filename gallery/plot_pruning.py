r"""
Pruning by curvature
====================

After this page you can rank the weights of a network, and whole units, by what removing them costs, with the Hessian (optimal
brain damage, LeCun et al. 1989) or with its inverse (optimal brain surgeon, Hassibi and Stork 1992), and let the other weights
make up for a removed one. At a minimiser of :math:`f`, with the Hessian :math:`A` of :math:`f`, removing weight :math:`w_q`
costs about

.. math:: \tfrac{1}{2} A_{qq} w_q^2 \quad \text{alone, and} \quad \frac{w_q^2}{2 [A^{-1}]_{qq}} \quad \text{if all others
          move by } -\frac{w_q}{[A^{-1}]_{qq}} A^{-1} e_q.

:func:`curvalg.estimate.saliency` gives the first of a matrix, the second of its inverse, and both for groups of weights.
"""

# %%
# A minimiser
# -----------
# A network of 610 parameters on four hundred digits, trained with a penalty on the weights until the gradient is next to
# nothing. The Hessian of what is minimised is that of the loss and :math:`\lambda I`.

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Identity, Problem, inverse, registry
from curvalg.estimate import saliency

images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images[:400] / 16), torch.tensor(labels[:400])
DECAY = 1e-3
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.LBFGS(
    model.parameters(),
    max_iter=3000,
    max_eval=4000,
    tolerance_grad=1e-7,
    tolerance_change=0,
    history_size=50,
    line_search_fn="strong_wolfe",
)


def penalised():
    optimizer.zero_grad()
    value = loss(model(X), y) + DECAY / 2 * sum(
        p.square().sum() for p in model.parameters()
    )
    value.backward()
    return value


optimizer.step(penalised)
print(
    f"largest gradient {max(float(p.grad.abs().max()) for p in model.parameters()):.0e}"
)
problem = Problem(model, loss, (X, y))
trained = problem.layout.flatten(
    {name: p.detach() for name, p in model.named_parameters()}
)


def f(weights):
    with torch.no_grad():
        output = torch.func.functional_call(model, problem.layout.unflatten(weights), X)
        return float(loss(output, y)) + DECAY / 2 * float(weights.square().sum())


# %%
# Two prices
# ----------
# With a product for every weight both are exact; fewer give estimates with errors. The second price is never higher than the
# first: the other weights may stay where they are, but need not.

curvature = registry.build("hessian") + DECAY * Identity
values = curvature.lower(problem).exact("eigh").eigenvalues
print(f"eigenvalues from {values[0]:.1e} to {values[-1]:.2f}")
assert values[0] > 0

prunable = torch.zeros(problem.size, dtype=torch.bool)
for name, at in problem.layout.slices.items():
    prunable[at] = name.endswith("weight")
covariance = inverse(curvature).lower(problem)
damage = saliency(curvature.lower(problem), products=problem.size).value.where(
    prunable, torch.inf
)
surgery = saliency(covariance, products=problem.size).value.where(prunable, torch.inf)
assert (surgery[prunable] <= damage[prunable] * (1 + 1e-9)).all()

# %%
# Do they hold?
# -------------
# Forty weights across the range, each removed from the trained network, alone and with the others making up for it. The
# prices are those of the quadratic model, so they are best where they are low; the order is right over seven powers of ten. The
# size of a weight says less.

worth = (surgery > 1e-9) & prunable
ranked = surgery.where(worth, torch.inf).argsort()[: int(worth.sum())]
chosen = ranked[torch.linspace(0, len(ranked) - 1, 40).round().long()]
columns = covariance @ torch.eye(problem.size, dtype=torch.float64)[:, chosen]
base, costs = f(trained), {"alone": [], "with the others": []}
for q, column in zip(chosen, columns.T, strict=True):
    alone = trained.clone()
    alone[q] = 0
    costs["alone"].append(f(alone) - base)
    costs["with the others"].append(f(trained - trained[q] / column[q] * column) - base)
prices = {"alone": damage[chosen].numpy(), "with the others": surgery[chosen].numpy()}
for name, price in prices.items():
    correlation = spearmanr(price, costs[name]).statistic
    print(f"{name}: rank correlation of price and cost {correlation:.3f}")
    assert correlation > 0.95
by_size = spearmanr(trained[chosen].abs(), costs["alone"]).statistic
print(f"by size: rank correlation with the cost alone {by_size:.3f}")
assert by_size < spearmanr(prices["alone"], costs["alone"]).statistic
cheap = prices["with the others"] < 1e-5
np.testing.assert_allclose(
    np.array(costs["with the others"])[cheap],
    prices["with the others"][cheap],
    rtol=0.5,
)

# %%
# Whole units
# -----------
# A group of weights has one price. ``"row"`` takes the rows of every tensor: the incoming weights of each hidden unit, and of
# each class. So many weights at once are no small step: the prices are several times too low. Their order is nearer the truth
# than that of the sizes.

matrix_rows, inverse_rows = (
    saliency(curvature.lower(problem), "row"),
    saliency(covariance, "row"),
)
rows = [i for i, name in enumerate(matrix_rows.names) if "weight" in name]
row_prices, truth_of_rows, sizes = matrix_rows.value[rows].numpy(), [], []
for name in (matrix_rows.names[i] for i in rows):
    tensor, number = name[:-1].split("[")
    pruned = problem.layout.unflatten(trained.clone())
    sizes.append(float(pruned[tensor][int(number)].norm()))
    pruned[tensor][int(number)] = 0
    truth_of_rows.append(f(problem.layout.flatten(pruned)) - f(trained))
assert (inverse_rows.value[rows] <= matrix_rows.value[rows] * (1 + 1e-9)).all()
of_price, of_size = (
    float(spearmanr(score, truth_of_rows).statistic) for score in (row_prices, sizes)
)
assert of_price > max(0.85, of_size)
print(
    f"rows: rank correlation of price and cost {of_price:.2f}, of size and cost "
    f"{of_size:.2f}"
)

# %%
# Many weights
# ------------
# One weight after the other, always the cheapest. After a removal the inverse of what is left follows from the old one by a
# rank-one update, so that the whole takes a single inversion. For comparison, the weights of least damage and those of least
# size are set to zero without making up for them. The network is never trained again.

counts = np.arange(0, int(prunable.sum()) + 1, 10)
weights, remaining, matrix = trained.clone(), prunable.clone(), covariance.to_dense()
ways = {"surgeon": [weights.clone()], "damage": [], "size": []}
for k in range(1, counts[-1] + 1):
    q = int((weights**2 / (2 * matrix.diagonal())).where(remaining, torch.inf).argmin())
    column = matrix[:, q] / matrix[q, q]
    weights = weights - weights[q] * column
    matrix = matrix - torch.outer(column, matrix[:, q])
    remaining[q] = False
    weights[prunable & ~remaining] = 0
    if k in counts:
        ways["surgeon"].append(weights.clone())
for name, price in (
    ("damage", damage),
    ("size", trained.abs().where(prunable, torch.inf)),
):
    order = price.argsort()
    for k in counts:
        pruned = trained.clone()
        pruned[order[:k]] = 0
        ways[name].append(pruned)


def accuracy(weights):
    with torch.no_grad():
        output = torch.func.functional_call(
            model, problem.layout.unflatten(weights), unseen
        )
        return float((output.argmax(1) == truth).double().mean())


unseen, truth = torch.tensor(images[400:] / 16), torch.tensor(labels[400:])
losses = {name: np.array([f(w) for w in found]) for name, found in ways.items()}
right = {name: np.array([accuracy(w) for w in found]) for name, found in ways.items()}
for name in ways:
    reached = ", ".join(
        f"{losses[name][i]:.3f} and {right[name][i]:.1%}" for i in (0, 30, 40, 50)
    )
    print(f"{name:8} objective and accuracy after 0, 300, 400, 500 removals: {reached}")

# %%
# Of 592 weights 400 can go at next to no cost if the others make up for them. The diagonal alone is better than the size, by
# a factor while little is lost, but neither sees that weights stand in for each other.

for i in range(20, 51, 5):
    assert losses["surgeon"][i] < min(losses["damage"][i], losses["size"][i])
assert losses["surgeon"][40] - base < 0.2 * (
    min(losses["damage"][40], losses["size"][40]) - base
)
assert losses["damage"][25] < losses["size"][25]

blue, red, yellow, grey = "#0b3c5d", "#c8553d", "#d9a441", "#9aa3ad"
figure, panels = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
panels = first, group, second, third = panels.ravel()
first.loglog(
    prices["alone"], costs["alone"], "o", color=red, markersize=4, label="alone"
)
first.loglog(
    prices["with the others"],
    costs["with the others"],
    "s",
    color=blue,
    markersize=4,
    label="others make up",
)
first.axline((1e-9, 1e-9), (1e-3, 1e-3), color=grey, linewidth=1.2)
first.set(xlabel="price by the quadratic model", ylabel="rise of the objective")
first.set_title("Removing one weight", loc="left", color=blue, fontsize=11)
group.loglog(
    row_prices, truth_of_rows, "o", color=red, markersize=5, label="rows, alone"
)
group.axline((1e-2, 1e-2), (1, 1), color=grey, linewidth=1.2)
group.set(xlabel="price by the quadratic model", ylabel="rise of the objective")
group.set_title("Removing a unit's weights", loc="left", color=blue, fontsize=11)
looks = {
    "surgeon": (blue, "-", "whole inverse"),
    "damage": (red, "--", "diagonal"),
    "size": (grey, ":", "size"),
}
for name, (colour, dash, label) in looks.items():
    second.plot(
        counts,
        np.maximum(losses[name] - base, 1e-9),
        dash,
        color=colour,
        linewidth=2,
        label=label,
    )
    third.plot(counts, 100 * right[name], dash, color=colour, linewidth=2, label=label)
second.set(
    yscale="log",
    ylim=(1e-6, 10),
    xlabel="weights removed",
    ylabel="rise of the objective",
)
second.set_title("Removing many", loc="left", color=blue, fontsize=11)
third.set(
    xlabel="weights removed", ylabel="percent right on unseen digits", ylim=(0, 100)
)
third.set_title("What it does to predictions", loc="left", color=blue, fontsize=11)
for axes, where in zip(
    panels, ("upper left", "upper left", "upper left", "lower left"), strict=True
):
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc=where)
plt.show()
