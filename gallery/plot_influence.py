r"""
Influence functions: who taught the model that?
===============================================

After this page you can find wrong labels in a network that cannot be trained again a thousand times, ask which training images
helped or harmed a prediction, keep the factors for later questions, and say how far the answers can be trusted. At a minimiser
of :math:`L(w) + \tfrac{\lambda}{2} \lVert w \rVert^2`, leaving out the share :math:`c_n` of sample :math:`n` moves the weights
by about :math:`(H + \lambda I)^{-1} \nabla c_n`, and the loss :math:`\ell` of a query by

.. math:: \nabla \ell^\top (H + \lambda I)^{-1} \nabla c_n

(Koh and Liang, arXiv 1703.04730). Samples with positive scores help, those with negative ones do harm. Large networks take the
Kronecker-factored approximation EKFAC in the place of :math:`H` (Grosse et al., arXiv 2308.03296).
"""

# %%
# Digits, some of them mislabelled
# --------------------------------
# A network of two convolutions on twelve hundred images of handwritten digits, of which every tenth got one of the nine wrong
# labels. One is stopped early, and one is trained until it knows the wrong labels by heart.

import copy
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Identity, Problem, inverse, load, registry, save
from curvalg.estimate import influence, self_influence

images, labels = load_digits(return_X_y=True)
X, y = (
    torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8),
    torch.tensor(labels),
)
generator = torch.Generator().manual_seed(0)
order = torch.randperm(len(X), generator=generator)
train, asking = order[:1200], order[1200:]
N, WRONG = 1200, 120

given = y[train].clone()
given[:WRONG] = (
    given[:WRONG] + torch.randint(1, 10, (WRONG,), generator=generator)
) % 10
mislabelled = torch.arange(N) < WRONG
loss = nn.CrossEntropyLoss()


def trained(epochs):
    torch.manual_seed(0)
    convolutions = [
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
    ]
    model = nn.Sequential(
        *convolutions, nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(N, generator=generator).split(64):
            optimizer.zero_grad()
            loss(model(X[train][rows]), given[rows]).backward()
            optimizer.step()
    return model


networks = {"stopped early": trained(12), "learnt by heart": trained(100)}
with torch.no_grad():
    for name, model in networks.items():
        right = (model(X[asking]).argmax(1) == y[asking]).double().mean()
        learnt = (model(X[train]).argmax(1) == given)[mislabelled].double().mean()
        print(
            f"{name}: {right:.1%} of the new images are right, {learnt:.1%} of the "
            "wrong labels are known"
        )

# %%
# Factors that outlive the program
# --------------------------------
# Factors are what takes time. ``bound`` computes them, :func:`~curvalg.save` writes them, and with the file any later program
# answers any question, with any damping.

folder = tempfile.TemporaryDirectory()
files = {name: Path(folder.name) / f"{name}.safetensors" for name in networks}
problems = {
    name: Problem(model, loss, (X[train], given)) for name, model in networks.items()
}
for name, problem in problems.items():
    save(registry.build("ekfac").bound(problem), files[name])
    print(
        f"{name}: {problem.size} parameters, a file of "
        f"{files[name].stat().st_size / 1e6:.1f} MB"
    )

# %%
# Finding wrong labels
# --------------------
# The influence of a sample on itself predicts by how much its own loss rises when it is left out. It needs no other data, and
# one pass gives all of them. Where there are images whose labels are right, these ask: ``topk`` keeps the extremes of each
# query alone, and those samples come first that are most often among the twenty most harmful of a query. For comparison, the
# samples are sorted by their own losses.

operators = {
    name: inverse(load(files[name], problem) + 1e-2 * Identity).lower(problem)
    for name, problem in problems.items()
}
queries = {
    name: Problem(model, loss, (X[asking], y[asking]))
    for name, model in networks.items()
}
found = {name: influence(op, queries[name], topk=20) for name, op in operators.items()}
counts = {}
for name, op in operators.items():
    own = self_influence(op)
    blamed = torch.bincount(found[name].topk.smallest_samples.flatten(), minlength=N)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(
            networks[name](X[train]), given, reduction="none"
        )
    rules = {
        "harm to others": blamed + own / own.max(),
        "influence on itself": own,
        "own loss": losses,
    }
    counts[name] = {
        rule: mislabelled[s.argsort(descending=True)].cumsum(0).numpy()
        for rule, s in rules.items()
    }
    for rule, count in counts[name].items():
        print(
            f"{name}: {count[WRONG - 1] / WRONG:.0%} of the first {WRONG} by {rule} "
            "are mislabelled"
        )
folder.cleanup()

# %%
# One in ten would be chance. In the network that was stopped early all three find nearly all wrong labels. Once the network
# knows them by heart, neither their losses nor what they do to themselves tell as much; but they go on harming others.

precision = {
    name: {rule: count[WRONG - 1] / WRONG for rule, count in rules.items()}
    for name, rules in counts.items()
}
assert min(precision["stopped early"].values()) > 0.8
assert (
    precision["learnt by heart"]["harm to others"]
    > precision["learnt by heart"]["own loss"] + 0.05
)
assert min(precision["learnt by heart"].values()) > 0.4

blue, red, yellow, grey = "#0b3c5d", "#c8553d", "#d9a441", "#9aa3ad"
figure, panels = plt.subplots(
    1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True
)
for axes, (name, rules) in zip(panels, counts.items(), strict=True):
    for (rule, count), colour in zip(rules.items(), (red, yellow, blue), strict=True):
        axes.plot(np.arange(1, N + 1), count, color=colour, linewidth=2, label=rule)
    axes.plot([0, N], [0, WRONG], ":", color=grey, linewidth=1.6, label="chance")
    axes.set(xlim=(0, 400), ylim=(0, WRONG + 2), xlabel="images inspected")
    axes.set_title(
        f"A network {name}" if "stopped" in name else "Wrong labels learnt by heart",
        loc="left",
        color=blue,
    )
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("mislabelled images found")
panels[0].legend(frameon=False, loc="lower right")

# %%
# Who taught it that?
# -------------------
# Of the images that the early network gets wrong, the one with the largest loss asks. ``plot`` draws its most helpful and its
# most harmful training images; the labels say what each was taught to be.

name = "stopped early"
with torch.no_grad():
    hardest = int(
        nn.functional.cross_entropy(
            networks[name](X[asking]), y[asking], reduction="none"
        ).argmax()
    )
    taken_for = int(networks[name](X[asking][hardest : hardest + 1]).argmax())
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.5, 4.6), layout="constrained", width_ratios=(1, 2.6)
)
left.imshow(X[asking][hardest, 0], cmap="gray", interpolation="nearest")
left.set(xticks=[], yticks=[])
left.set_title(f"a {int(y[asking][hardest])}, taken for a {taken_for}", color=blue)
found[name].plot(right, query=hardest, count=5, samples=X[train])
drawn = [int(label.get_text().split()[-1]) for label in right.get_yticklabels()]
right.set_yticks(
    range(len(drawn)),
    [
        f"labelled {int(given[n])}" + (", wrongly" if mislabelled[n] else "")
        for n in drawn
    ],
)
harmful = found[name].topk.smallest_samples[hardest, :5]
helpful = found[name].topk.largest_samples[hardest, :5]
print(
    "labels of the helpful",
    given[helpful].tolist(),
    "and of the harmful",
    given[harmful].tolist(),
)
assert (given[helpful] == y[asking][hardest]).sum() >= 4
assert (given[harmful] != y[asking][hardest]).all()

# %%
# How far to trust it
# -------------------
# On a small network the truth can be had: leave a sample out and train again. A few steps of Newton's method from the old
# minimiser reach the new one. The loss is a sum here, so that what is left out leaves the shares of all others as they were.

total, DECAY, SMALL = nn.CrossEntropyLoss(reduction="sum"), 5.0, 200
Z = X.double().reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
inputs, targets, others = (
    Z[train][-SMALL:],
    given[-SMALL:].clone(),
    (Z[asking][:20], y[asking][:20]),
)
targets[:20] = (targets[:20] + 1) % 10
torch.manual_seed(0)
small = nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 10)).double()
optimizer = torch.optim.LBFGS(
    small.parameters(), max_iter=1500, max_eval=2000, line_search_fn="strong_wolfe"
)


def penalised():
    optimizer.zero_grad()
    value = total(small(inputs), targets) + DECAY / 2 * sum(
        p.square().sum() for p in small.parameters()
    )
    value.backward()
    return value


optimizer.step(penalised)
problem = Problem(small, total, (inputs, targets))
damped = registry.build("hessian") + DECAY * Identity


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def refined(problem, most=12):
    """The gradient's norm after steps of Newton's method, next to nothing."""
    for _ in range(most):
        gradient = problem.gradient() + DECAY * flat(small)
        if gradient.norm() < 1e-8:
            break
        problem.step(inverse(damped).lower(problem) @ gradient)
    return float(gradient.norm())


def asked():
    with torch.no_grad():
        return nn.functional.cross_entropy(
            small(others[0]), others[1], reduction="none"
        )


assert refined(problem) < 1e-8
before, minimiser = asked(), copy.deepcopy(small.state_dict())
matrices = {"Hessian": "hessian", "GGN": "ggn", "EKFAC": "ekfac"}
question = Problem(small, total, others)
scores = {
    name: influence(
        inverse(registry.build(term) + DECAY * Identity).lower(problem), question
    ).scores
    for name, term in matrices.items()
}
scores["gradients alone"] = influence((1.0 * Identity).lower(problem), question).scores

left_out, actual = torch.arange(0, SMALL, 4), []
for n in left_out:
    keep = torch.arange(SMALL) != n
    assert refined(problem.with_data((inputs[keep], targets[keep]))) < 1e-8
    actual.append(asked() - before)
    small.load_state_dict(minimiser)
actual = torch.stack(actual, 1)
ranks = {
    name: float(spearmanr(s[:, left_out].flatten(), actual.flatten()).statistic)
    for name, s in scores.items()
}
for name, rank in ranks.items():
    print(
        f"{name:15} rank correlation with {actual.numel()} changes after training "
        f"again {rank:.3f}"
    )
assert ranks["Hessian"] >= 0.95
assert ranks["Hessian"] > ranks["GGN"] > ranks["EKFAC"] > ranks["gradients alone"] > 0

# %%
# With the Hessian the prediction is nearly the truth. Every approximation costs some of it, and each is still far better than
# comparing gradients without any curvature.

figure, panels = plt.subplots(
    1, 3, figsize=(9.5, 3.4), layout="constrained", sharey=True
)
for axes, name in zip(panels, ("Hessian", "EKFAC", "gradients alone"), strict=True):
    shown = scores[name][:, left_out]
    if name == "gradients alone":
        shown = (
            shown * (shown * actual).sum() / shown.square().sum()
        )  # they have no scale of their own
    axes.axline((0, 0), slope=1, color=grey, linewidth=1.2)
    axes.plot(
        1e3 * shown.flatten(), 1e3 * actual.flatten(), ".", color=blue, markersize=3
    )
    axes.set_title(
        f"{name}: rank correlation {ranks[name]:.2f}",
        loc="left",
        color=blue,
        fontsize=11,
    )
    axes.set_xlabel("predicted change of the loss, 10⁻³")
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("after training again, 10⁻³")
plt.show()
