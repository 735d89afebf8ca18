r"""
Influence functions: who taught the model that?
===============================================

After this page you can ask of every training image what leaving it out would do to the predictions on other images, without
training again, find mislabelled images that way, and check the answers by training again where that is affordable.
At a minimiser of :math:`f(w) = L(w) + \tfrac{\lambda}{2} \lVert w \rVert^2`, leaving out the share :math:`c_n` of sample
:math:`n` moves the weights by about :math:`(H + \lambda I)^{-1} \nabla c_n`, and another loss :math:`\ell` by

.. math:: \nabla \ell^\top (H + \lambda I)^{-1} \nabla c_n

(Koh and Liang, arXiv 1703.04730). One solve with :math:`\nabla \ell` serves all samples.
"""

# %%
# Digits, some of them mislabelled
# --------------------------------
# Softmax regression on six hundred images of handwritten digits, of which sixty got one of the nine wrong labels. Two hundred
# other images, labelled correctly, ask the question. The problem is convex, so training again is reproducible.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Identity, Problem, inverse, registry
from curvalg.estimate import influence

images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images / 16), torch.tensor(labels)
generator = torch.Generator().manual_seed(0)
order = torch.randperm(len(X), generator=generator)
train, asking, test = order[:600], order[600:800], order[800:]
N, WRONG, DECAY = 600, 60, 1e-2

given = y[train].clone()
given[:WRONG] = (given[:WRONG] + torch.randint(1, 10, (WRONG,), generator=generator)) % 10
mislabelled = torch.arange(N) < WRONG
loss = nn.CrossEntropyLoss()


def fit(keep):
    """The minimiser of the loss of some samples, whose shares are still one N-th, and the penalty."""
    model = nn.Linear(64, 10).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        fitted = loss(model(X[train][keep]), given[keep]) * len(given[keep]) / N
        value = fitted + DECAY / 2 * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimizer.step(objective)
    objective()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-7
    return model


everything = torch.ones(N, dtype=torch.bool)
model = fit(everything)


def asked(model):
    with torch.no_grad():
        return float(loss(model(X[asking]), y[asking]))


# %%
# One solve
# ---------
# Two problems with one model: the training data make the Hessian, the asking images a gradient.
# :func:`~curvalg.estimate.influence` multiplies the solution with the gradient of every training sample, in one pass and
# without making these gradients.

problem = Problem(model, loss, (X[train], given))
question = Problem(model, loss, (X[asking], y[asking]))
op = inverse(registry.build("hessian") + DECAY * Identity).lower(problem)
change = influence(op, question.gradient())
print(change.shape, "solved by", "dense factorisation" if op.last_solve.iterations.max() == 0 else "iteration")

# %%
# Against training again
# ----------------------
# Sixteen samples, eight of them among the most harmful, are left out, one at a time. The prediction is of first order in the
# share of one sample; among what it leaves out is that the sample takes its own curvature with it.

ranked = change.argsort()
chosen = ranked[torch.cat([torch.linspace(0, 70, 8), torch.linspace(90, N - 1, 8)]).round().long()]
before = asked(model)
actual = []
for n in chosen:
    keep = everything.clone()
    keep[n] = False
    actual.append(asked(fit(keep)) - before)
actual, predicted = np.array(actual), change[chosen].numpy()
correlation = float(np.corrcoef(actual, predicted)[0, 1])
error = float(np.linalg.norm(actual - predicted) / np.linalg.norm(actual))
print(f"correlation {correlation:.4f}, relative error {error:.2f}")
assert correlation > 0.99
assert error < 0.15
large = np.abs(predicted) > 0.2 * np.abs(predicted).max()
assert (np.sign(actual[large]) == np.sign(predicted[large])).all()

# %%
# The mislabelled ones
# --------------------
# The samples whose absence would lower the asked loss most are inspected first. Of six hundred, one in ten is mislabelled;
# of the first sixty in this order, most are. Sorting by the samples' own losses finds as many here, and finds the last ones
# sooner: a wrong label that does no harm to the images that ask is of no concern to the influence.

with torch.no_grad():
    own = nn.functional.cross_entropy(model(X[train]), given, reduction="none")
orders = {"influence on other images": ranked, "own loss": own.argsort(descending=True)}
found = {name: mislabelled[which].double().cumsum(0).numpy() for name, which in orders.items()}
for name, count in found.items():
    last = np.argmax(count == WRONG) + 1
    print(f"{name:26} {count[WRONG - 1]:.0f} of the first {WRONG} are mislabelled, the last of all is number {last}")
precision = found["influence on other images"][WRONG - 1] / WRONG
assert precision > 6 * WRONG / N

# %%
# Leaving them out together
# -------------------------
# The sum of many small changes is no longer a small change, and the prediction for all sixty is only of the right size. What
# counts is that the model is better on images that had no part in this.

keep = everything.clone()
keep[ranked[:WRONG]] = False
cleaned = fit(keep)
gain, hoped = asked(cleaned) - before, float(change[ranked[:WRONG]].sum())
with torch.no_grad():
    tested = [float(loss(m(X[test]), y[test])) for m in (model, cleaned)]
    right = [float((m(X[test]).argmax(1) == y[test]).double().mean()) for m in (model, cleaned)]
print(f"asked loss changes by {gain:.3f}, predicted {hoped:.3f}")
print(f"test loss {tested[0]:.3f} -> {tested[1]:.3f}, accuracy {right[0]:.1%} -> {right[1]:.1%}")
assert 0.5 < hoped / gain < 1.5
assert tested[1] < 0.9 * tested[0]

# %%
# Left: the sixteen answers against the truth. Right: how many mislabelled images are found, in the order of inspection.
# Below: the twelve images that the influence finds most harmful, with the label they were given.

blue, red, grey = "#0b3c5d", "#c8553d", "#9aa3ad"
figure = plt.figure(figsize=(9.5, 6.6), layout="constrained")
upper, lower = figure.subfigures(2, 1, height_ratios=(1.9, 1))
left, middle = upper.subplots(1, 2)
left.axline((0, 0), slope=1, color=grey, linewidth=1.2)
for wrong, colour, label in ((False, blue, "right label"), (True, red, "wrong label")):
    which = (mislabelled[chosen] == wrong).numpy()
    left.plot(1e3 * predicted[which], 1e3 * actual[which], "o", color=colour, label=label)
left.set(xlabel="predicted change of the loss, 10⁻³", ylabel="after training again, 10⁻³")
left.set_title("Leaving out one image", loc="left", color=blue)
inspected = np.arange(1, N + 1)
middle.plot(inspected, found["influence on other images"], color=red, linewidth=2, label="influence on other images")
middle.plot(inspected, found["own loss"], "--", color=blue, linewidth=1.6, label="own loss")
middle.plot(inspected, inspected * WRONG / N, ":", color=grey, linewidth=1.6, label="chance")
middle.set(xlabel="images inspected", ylabel="mislabelled images found", xlim=(0, 300), ylim=(0, WRONG + 2))
middle.set_title("Finding wrong labels", loc="left", color=blue)
for axes in (left, middle):
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
lower.suptitle("Most harmful", x=0.01, ha="left", color=blue)
for axes, n in zip(lower.subplots(2, 6).ravel(), ranked[:12], strict=True):
    axes.imshow(images[int(train[n])].reshape(8, 8), cmap="Greys", interpolation="nearest")
    truth = int(y[train][n])
    label = f"labelled {int(given[n])}" + (f", is {truth}" if mislabelled[n] else "")
    axes.set_title(label, fontsize=9, color=red if mislabelled[n] else blue, pad=3)
    axes.set(xticks=[], yticks=[])
plt.show()
