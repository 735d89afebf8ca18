r"""
Natural gradient against Newton
===============================

After this page you can write second-order training steps as one line each, choose their damping by what the quadratic
model promised, know why the natural gradient is ahead at the start of training and Newton's method at the end, and train on
minibatches by K-FAC in twenty lines. All steps are of one form,

.. math:: p = -(A + c I)^{-1} \nabla f,

with :math:`A = 0` for gradient descent, the Gauss-Newton matrix :math:`G` (which is the Fisher information for a
cross-entropy, so that this is the natural gradient), or the Hessian :math:`H`.
"""

# %%
# The problem
# -----------
# A network of 226 parameters on four hundred images of handwritten digits, shrunk to four by four pixels. Each step uses the
# whole data set, so that nothing is random but the start. What is minimised is the loss with a penalty,
#
# .. math:: f(w) = L(w) + \tfrac{\lambda}{2} \lVert w \rVert^2,
#
# which has a minimiser to converge to. The penalty adds :math:`\lambda I` to the curvature.
#
# In training every matrix is used once and then the parameters move. ``cache=0`` keeps no recordings between products and
# ``columns=64`` multiplies so many vectors at a time instead of measuring what is fastest; neither would pay here.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvalg import Identity, Problem, Zero, inverse, registry
from curvalg_plugins.kronecker import average_factors, damp_factors

images, labels = load_digits(return_X_y=True)
X = torch.tensor(images[:400].reshape(-1, 4, 2, 4, 2).mean((2, 4)) / 16).reshape(-1, 16)
y = torch.tensor(labels[:400])
DECAY = 1e-3


def fresh():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    return Problem(model, nn.CrossEntropyLoss(), (X, y), cache=0, columns=64), model


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def move(problem, model, step):
    with torch.no_grad():
        for name, change in problem.layout.unflatten(step).items():
            model.get_parameter(name).add_(change)


def objective(problem, model):
    return problem.value() + DECAY / 2 * float(flat(model).square().sum())


# %%
# One step of each
# ----------------
# Three expressions, and one line for the step. On so small a network all the inverses are exact, by dense factorisations; on
# a large one the same line is an iterative solve.

curvatures = {
    "gradient descent": Zero,
    "natural gradient": registry.build("ggn"),
    "Newton": registry.build("hessian"),
}
problem, model = fresh()
gradient = problem.gradient() + DECAY * flat(model)
steps = {
    name: -(inverse(A + Identity).lower(problem) @ gradient)
    for name, A in curvatures.items()
}
torch.testing.assert_close(steps["gradient descent"], -gradient)
fisher = registry.build("fisher")
torch.testing.assert_close(
    steps["natural gradient"], -(inverse(fisher + Identity).lower(problem) @ gradient)
)
hessian = curvatures["Newton"].lower(problem)
lowest, highest = hessian.exact("eigh").eigenvalues[[0, -1]]
print(f"eigenvalues of the Hessian at the start from {lowest:.3f} to {highest:.3f}")

# %%
# The Fisher information and the Gauss-Newton matrix give the same step. At the start the Hessian has negative eigenvalues;
# with a damping below the most negative one Newton's step would climb along its eigenvector instead of descending.

assert lowest < -0.1 * highest

# %%
# How well each model predicts
# ----------------------------
# Along a step :math:`p`, :math:`f(w + t p) = f(w) + t \, \nabla f^\top p + \tfrac{1}{2} t^2 p^\top (A + \lambda I) p` up to
# an error. With the Hessian the error is of third order in :math:`t`, and halving :math:`t` divides it by eight. With the
# Gauss-Newton matrix the residual :math:`H - G` is missing, and what is left is of second order: a division by four.


def predicted(A, problem, gradient, step):
    return float(
        gradient @ step + step @ ((A + DECAY * Identity).lower(problem) @ step) / 2
    )


start = objective(problem, model)
divisions = {}
for name in ("natural gradient", "Newton"):
    errors = []
    for t in (0.01, 0.005):
        move(problem, model, t * steps[name])
        change = objective(problem, model) - start
        move(problem, model, -t * steps[name])
        errors.append(
            change - predicted(curvatures[name], problem, gradient, t * steps[name])
        )
    divisions[name] = errors[0] / errors[1]
    print(
        f"{name}: halving the step divides the error of its model by "
        f"{divisions[name]:.2f}"
    )
assert 3.5 < divisions["natural gradient"] < 4.5
assert 7 < divisions["Newton"] < 9

# %%
# Training
# --------
# The damping follows Levenberg and Marquardt. The ratio :math:`\rho` of the actual to the predicted decrease says how far
# the model can be trusted: below a quarter the step is taken back and the damping multiplied by four, above three quarters
# the damping is divided by three. Every try counts. Newton's damping must also lift the lowest eigenvalue above zero, or the
# step may not descend.
#
# Gradient descent gets the same treatment, which makes :math:`1 / c` its learning rate and picks it anew in every step.


def train(A, tries, damping=1.0):
    problem, model = fresh()
    history = {
        "objective": [objective(problem, model)],
        "ratio": [],
        "gradient": [],
        "damping": [],
    }
    for _ in range(tries):
        gradient = problem.gradient() + DECAY * flat(model)
        history["gradient"].append(float(gradient.norm()))
        if history["gradient"][-1] < 1e-11:
            break
        if curvatures["Newton"] == A:
            lowest = float(A.lower(problem).exact("eigh").eigenvalues[0])
            damping = max(damping, 1.5 * max(0.0, -lowest - DECAY))
        step = -(inverse(A + (DECAY + damping) * Identity).lower(problem) @ gradient)
        promise = predicted(A, problem, gradient, step)
        before = history["objective"][-1]
        move(problem, model, step)
        after = objective(problem, model)
        ratio = (
            (after - before) / promise if -promise > 1e-13 else 1.0
        )  # smaller changes are lost in rounding
        if ratio < 0.25:
            move(problem, model, -step)
            after = before
        history["objective"].append(after)
        history["ratio"].append(ratio)
        history["damping"].append(damping)
        damping *= 4 if ratio < 0.25 else 1 / 3 if ratio > 0.75 else 1
    return {name: np.array(values) for name, values in history.items()} | {
        "end": flat(model)
    }


runs = {
    name: train(A, tries=60 if name == "Newton" else 36)
    for name, A in curvatures.items()
}
for name, run in runs.items():
    reached = " ".join(f"{run['objective'][k]:.3f}" for k in (0, 5, 10, 20))
    taken = run["ratio"][run["ratio"] >= 0.25]
    print(
        f"{name:17} objective after 0, 5, 10, 20 tries: {reached}; median ratio "
        f"{np.median(taken):.2f}"
    )

# %%
# Who wins
# --------
# Both leave gradient descent far behind. The natural gradient is ahead at first, while Newton's damping is held up by the
# negative eigenvalues. Then the residual matters, the natural gradient can no longer trust its model with little damping, and
# Newton's method overtakes it and converges. Of the steps that it takes, the Hessian predicts what they gain almost exactly.

f = {name: run["objective"] for name, run in runs.items()}
assert (
    f["natural gradient"][5] < 0.85 * f["Newton"][5] < 0.85 * f["gradient descent"][5]
)
assert f["Newton"][-1] < f["natural gradient"][-1] < 0.5 * f["gradient descent"][-1]
assert runs["Newton"]["gradient"][-1] < 1e-11
good = runs["Newton"]["ratio"][runs["Newton"]["ratio"] >= 0.25]
assert 0.9 < np.median(good) < 1.1
for run in runs.values():
    assert (np.diff(run["objective"]) <= 1e-13).all()  # rounding

# %%
# Near the minimiser
# ------------------
# Newton's run ends at a minimiser :math:`w_*`. In its neighbourhood a step with fixed damping :math:`c` multiplies the
# distance to it by
#
# .. math:: I - (A + (\lambda + c) I)^{-1} (H + \lambda I),
#
# which for :math:`A = G` is :math:`(G + (\lambda + c) I)^{-1} (c I - R)` with the residual :math:`R = H - G`, an expression
# like any other. All its eigenvalues are below one, but nothing keeps them above minus one: if the residual is large beside
# the curvature of the loss, the undamped natural gradient runs away from the very minimum it should find, at the rate of its
# most negative eigenvalue. With damping it converges slowly. For Newton's step the matrix is zero, and the convergence is
# quadratic.

minimiser = runs["Newton"]["end"]
ggn, residual = registry.build("ggn"), registry.build("residual")


def placed(w):
    problem, model = fresh()
    move(problem, model, w - flat(model))
    return problem, model


def distances(A, damping, start, steps):
    problem, model = placed(start)
    found = [float((start - minimiser).norm())]
    for _ in range(steps):
        gradient = problem.gradient() + DECAY * flat(model)
        move(
            problem,
            model,
            -(inverse(A + (DECAY + damping) * Identity).lower(problem) @ gradient),
        )
        found.append(float((flat(model) - minimiser).norm()))
    return np.array(found)


def rates(damping):
    problem, _ = placed(minimiser)
    matrix = inverse(ggn + (DECAY + damping) * Identity) @ (
        damping * Identity - residual
    )
    return torch.linalg.eigvals(matrix.lower(problem).to_dense()).real


direction = torch.randn(
    len(minimiser), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
)
near = minimiser + 1e-2 * direction / direction.norm()
DAMPING = 0.03
local = {
    "natural gradient, no damping": distances(ggn, 0, near, 6),
    f"natural gradient, c = {DAMPING}": distances(ggn, DAMPING, near, 12),
    "Newton, no damping": distances(curvatures["Newton"], 0, near, 2),
}
undamped, damped, newton = local.values()
print(f"eigenvalues without damping from {rates(0).min():.2f} to {rates(0).max():.3f}")
print(
    f"with damping {DAMPING} from {rates(DAMPING).min():.2f} to "
    f"{rates(DAMPING).max():.3f}"
)
tiny = distances(ggn, 0, minimiser + 1e-4 * (near - minimiser), 6)
print(f"last step without damping multiplies the distance by {tiny[-1] / tiny[-2]:.2f}")

assert rates(0).max() < 1
assert rates(DAMPING).max() < 1
assert rates(0).min() < -1 < rates(DAMPING).min()
assert abs(tiny[-1] / tiny[-2] / -float(rates(0).min()) - 1) < 0.05
assert (np.diff(damped) < 0).all()
assert newton[2] < newton[1] ** 1.5
assert newton[1] < newton[0] ** 1.5

# %%
# Left: training from the same random start. Right: steps of fixed damping from a point close to the minimiser.

colours = {
    "gradient descent": "#9aa3ad",
    "natural gradient": "#c8553d",
    "Newton": "#0b3c5d",
}
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.5, 4.2), layout="constrained", width_ratios=(1.25, 1)
)
floor = f["Newton"][-1]
for name, values in f.items():
    left.plot(
        np.maximum(values - floor, 1e-9), color=colours[name], linewidth=2, label=name
    )
left.set(
    yscale="log",
    ylim=(1e-7, 5),
    xlabel="steps tried",
    ylabel="objective above its minimum",
)
left.set_title(
    "From the start: natural gradient leads, Newton wins",
    loc="left",
    color="#0b3c5d",
    fontsize=11,
)
for name, values in local.items():
    dashed = "--" if "c =" in name else "-"
    right.plot(
        values,
        "o" + dashed,
        color=colours[name.split(",")[0]],
        markersize=4,
        label=name,
    )
right.set(
    yscale="log", ylim=(1e-11, 30), xlabel="steps", ylabel="distance to the minimiser"
)
right.set_title("Near the minimiser", loc="left", color="#0b3c5d", fontsize=11)
for axes in (left, right):
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
left.legend(frameon=False, loc="lower left")
right.legend(frameon=False, loc="center right")

# %%
# On minibatches
# --------------
# Larger networks take a Kronecker-factored approximation of the Gauss-Newton matrix, of one minibatch at a time (K-FAC,
# Martens and Grosse, arXiv 1503.05671). ``with_data`` is the problem on the next batch; the factors are averaged over the
# steps and damped, so that their inverses take Cholesky factorisations; ``step`` moves the parameters. This is the whole
# optimizer:


def natural(problem, batches, decay=0.9, damping=1e-2, size=0.5):
    kfac, running = registry.build("kfac"), None
    for data in batches:
        batch = problem.with_data(data)
        new = kfac.bound(batch)
        running = new if running is None else average_factors(running, new, decay)
        batch.step(
            inverse(damp_factors(running, damping)).lower(batch) @ batch.gradient(),
            size,
        )
        yield problem.value()


def minibatches(epochs=8, rows=50):
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for part in torch.randperm(len(X), generator=generator).split(rows):
            yield X[part], y[part]


def usual(make):
    problem, model = fresh()
    optimizer, loss = make(model.parameters()), nn.CrossEntropyLoss()
    for inputs, targets in minibatches():
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
        yield problem.value()


progress = {
    "K-FAC": list(natural(fresh()[0], minibatches())),
    "SGD with momentum": list(
        usual(lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9))
    ),
    "Adam": list(usual(lambda p: torch.optim.Adam(p, lr=0.1))),
}
for name, values in progress.items():
    reached = " ".join(f"{values[k - 1]:.3f}" for k in (8, 16, 32, 64))
    print(f"{name:17} loss of all data after 1, 2, 4, 8 passes: {reached}")

# %%
# The others have learning rates that suit them, and need about twice as many passes over the data. A step of K-FAC costs more
# than one of theirs; on so small a network far more.

assert progress["K-FAC"][15] < min(
    progress["Adam"][31], progress["SGD with momentum"][31]
)

figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for (name, values), colour in zip(
    progress.items(), ("#c8553d", "#9aa3ad", "#0b3c5d"), strict=True
):
    axes.semilogy(
        np.arange(1, len(values) + 1) / 8, values, color=colour, linewidth=2, label=name
    )
axes.set(xlabel="passes over the data", ylabel="loss of all data")
axes.set_title("Minibatches of fifty", loc="left", color="#0b3c5d", fontsize=11)
axes.grid(color="#e3e5e8")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
plt.show()
