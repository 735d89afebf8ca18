r"""
A potential from energies and forces
====================================

After this page you can compute the curvature of a network whose forces are derivatives of its energies, see how much more is
known of its weights from forces, and put error bars on an energy curve. The network maps the distances of atoms to an energy
:math:`E(x, \theta)`; the forces :math:`F = -\partial E / \partial x` are taken by autograd inside of the model, so that the
Hessian of a loss of forces holds third derivatives.
"""

# %%
# Clusters
# --------
# Five atoms near a compact cluster, held together by a Morse potential of depth one and bond length one. Energies and forces
# are known with errors of a given size, as from a quantum-chemical calculation that is not converged to the end.

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from curvalg import Identity, Problem, inverse, registry

torch.manual_seed(0)
ATOMS, ENERGY_ERROR, FORCE_ERROR = 5, 0.02, 0.05
first, second = torch.triu_indices(ATOMS, ATOMS, 1)
COMPACT = (
    torch.tensor(
        [[0, 0, 0], [2, 0, 0], [1, 3**0.5, 0], [1, 0.577, 1.633], [1, 0.577, -1.633]]
    ).double()
    / 2
)


def distances(x):
    """Distances (n, pairs) of atoms at x (n, atoms, 3)."""
    return (x[:, first] - x[:, second]).norm(dim=-1)


def morse(r):
    return (1 - torch.exp(-2 * (r - 1))).square() - 1


def forces_of(energy, x, create_graph=False):
    (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=create_graph)
    return -slope


X = (COMPACT + 0.08 * torch.randn(16, ATOMS, 3, dtype=torch.float64)).requires_grad_()
E = morse(distances(X)).sum(1)
F = forces_of(E, X).flatten(1)
X, E = X.detach(), E.detach()
E, F = E + ENERGY_ERROR * torch.randn_like(E), F + FORCE_ERROR * torch.randn_like(F)
lengths = distances(X).flatten()
print(
    f"{len(X)} clusters, energies {E.min():.2f} to {E.max():.2f}, distances "
    f"{lengths.min():.2f} to {lengths.max():.2f}"
)

# %%
# The model
# ---------
# A small network of the distance, summed over all pairs. Its outputs are the energy and the forces side by side,
# :math:`(n, 1 + 3 \cdot 5)`, each in units of its error, so that half the sum of squares is a negative log-likelihood.
# ``create_graph=True`` makes forces functions of the weights. Positions are inputs; that they need gradients on the way is the
# model's own affair.


class Potential(nn.Module):
    def __init__(self, with_forces, width=12):
        super().__init__()
        self.with_forces = with_forces
        layers = [
            nn.Linear(1, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 1),
        ]
        self.pair = nn.Sequential(*layers)

    def energy(self, x):
        return self.pair(distances(x)[..., None]).sum((1, 2))

    def forward(self, x):
        if not self.with_forces:
            return self.energy(x)[:, None] / ENERGY_ERROR
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.energy(x)
            forces = forces_of(energy, x, create_graph=True)
        return torch.cat(
            [energy[:, None] / ENERGY_ERROR, forces.flatten(1) / FORCE_ERROR], 1
        )


targets = torch.cat([E[:, None] / ENERGY_ERROR, F / FORCE_ERROR], 1)
loss, DECAY = nn.MSELoss(reduction="sum"), 0.1


def trained(with_forces):
    """A potential at a minimum of half the squares, DECAY/2 ‖θ‖²; its problem."""
    torch.manual_seed(1)
    model = Potential(with_forces).double()
    y = targets if with_forces else targets[:, :1]
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=500,
        max_eval=600,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def objective():
        optimizer.zero_grad()
        value = (
            loss(model(X), y)
            + DECAY * sum(p.square().sum() for p in model.parameters())
        ) / 2
        value.backward()
        return value

    optimizer.step(objective)
    return model, Problem(model, loss, (X, y))


models, problems = {}, {}
for name, with_forces in (("energies", False), ("energies and forces", True)):
    models[name], problems[name] = trained(with_forces)
both = problems["energies and forces"]
print(both, f"half the loss {both.value() / 2:.0f} for {targets.numel()} numbers")

# %%
# Third derivatives
# -----------------
# A Hessian product of a loss of forces, against a central difference of the gradient:

hessian, ggn = registry.build("hessian"), registry.build("ggn")
model = models["energies and forces"]
weights = both.layout.flatten(
    {name: p.detach() for name, p in model.named_parameters()}
)
v = torch.randn(
    both.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
)


def gradient_at(theta):
    values = both.layout.unflatten(theta)
    values = {name: t.clone().requires_grad_() for name, t in values.items()}
    found = torch.autograd.grad(
        loss(torch.func.functional_call(model, values, (X,)), targets),
        list(values.values()),
    )
    return both.layout.flatten(dict(zip(values, found, strict=True)))


product, step = hessian.lower(both) @ v, 1e-5
difference = (gradient_at(weights + step * v) - gradient_at(weights - step * v)) / (
    2 * step
)
print(
    f"relative difference {float((product - difference).norm() / product.norm()):.0e}"
)
assert (product - difference).norm() < 1e-5 * product.norm()

# %%
# What forces tell
# ----------------
# The precision of the weights, given the data, is :math:`A = \tfrac{1}{2} G + \delta I` with the Gauss-Newton matrix :math:`G`
# of the sum of squares. Both at the same weights: of how many directions do the data know more than the prior does, and how
# many nats have been learned, :math:`\tfrac{1}{2} \log \det (A / \delta)`? Forces add a positive semi-definite matrix, so that
# no eigenvalue gets smaller.

alone = Potential(False).double()
alone.load_state_dict(model.state_dict())
spectra, known, learned = {}, {}, {}
for name, problem in (
    ("energies", Problem(alone, loss, (X, targets[:, :1]))),
    ("energies and forces", both),
):
    precision = (0.5 * ggn + DECAY * Identity).lower(problem)
    values = precision.exact("eigh").eigenvalues.flip(0)
    spectra[name] = values - DECAY
    known[name] = float((1 - DECAY / values).sum())
    learned[name] = (precision.exact("logdet") - problem.size * np.log(DECAY)) / 2
    print(f"{name}: effective dimension {known[name]:.1f}, {learned[name]:.1f} nats")
few = len(spectra["energies"])  # all others of energies alone are zero
assert few <= len(X)
assert (spectra["energies and forces"][:few] >= spectra["energies"] - 1e-6).all()
assert known["energies and forces"] > known["energies"] + 1
assert learned["energies and forces"] > 1.3 * learned["energies"]

# %%
# Error bars along a bond
# -----------------------
# The energy of two atoms at distance :math:`r` has the variance :math:`j^\top A^{-1} j`, with the gradient :math:`j(r)` of the
# energy with respect to the weights: a row of the Jacobian of the pair's network.

r = torch.linspace(0.5, 2.0, 91, dtype=torch.float64)
near = (r > lengths.min()) & (r < lengths.max())
means, deviations = {}, {}
for name, model in models.items():
    curve = model.pair
    jacobian = (
        registry.build("jacobian").lower(Problem(curve, None, [r[:, None]])).to_dense()
    )
    covariance = inverse(0.5 * ggn + DECAY * Identity).lower(problems[name])
    means[name] = curve(r[:, None])[:, 0].detach()
    deviations[name] = (jacobian * (covariance @ jacobian.T).T).sum(1).sqrt()
    held = (means[name] - morse(r)).abs() < 2 * deviations[name]
    here, there = (float(held[where].double().mean()) for where in (near, ~near))
    inside, outside = (float(deviations[name][where].mean()) for where in (near, ~near))
    print(
        f"{name}: error bars {inside:.3f} at distances in the data, {outside:.3f} "
        "elsewhere"
    )
    print(
        f"    the truth is within two of them at {here:.0%} of the distances in the "
        f"data, {there:.0%} elsewhere"
    )
    assert here > 0.9
    assert outside > 5 * inside
assert (
    deviations["energies and forces"][near] < deviations["energies"][near]
).double().mean() > 0.95
gain = float(
    deviations["energies"][near].mean() / deviations["energies and forces"][near].mean()
)
print(f"forces make the error bars {gain:.1f} times smaller")
assert gain > 3

# %%
# Left: no eigenvalue is smaller with forces, and most are larger by powers of ten. Middle: the energy of two atoms, with two
# error bars on either side. Right: the error bar itself, over the distances in the data. Closer together than in any cluster
# energies alone leave nearly everything open.

blue, red, grey = "#0b3c5d", "#c8553d", "#9aa3ad"
looks = {"energies": (red, "--", "s"), "energies and forces": (blue, "-", "o")}
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(9.5, 3.7), layout="constrained"
)
for name, (colour, dash, mark) in looks.items():
    shown = spectra[name][spectra[name] > 1e-4]
    left.semilogy(
        np.arange(1, len(shown) + 1),
        shown,
        mark,
        color=colour,
        markersize=4,
        label=name,
    )
    low, high = (means[name] + sign * 2 * deviations[name] for sign in (-1, 1))
    middle.fill_between(r, low, high, color=colour, alpha=0.25, linewidth=0)
    middle.plot(r, means[name], dash, color=colour, linewidth=1.6, label=name)
    right.semilogy(r, deviations[name], dash, color=colour, linewidth=2, label=name)
left.axhline(DECAY, color=grey, linewidth=1.2)
left.text(
    left.get_xlim()[1],
    DECAY,
    "prior",
    ha="right",
    va="bottom",
    fontsize=8,
    color="#5b6470",
)
left.set(xlabel="number", ylabel="eigenvalue of G/2", xticks=range(1, 12, 2))
left.set_title("What the data know", loc="left", color=blue, fontsize=11)
middle.plot(r, morse(r), ":", color="black", linewidth=1.4, label="truth")
middle.set(xlabel="distance", ylabel="energy of a pair", ylim=(-1.4, 2.2))
middle.set_title("Stretching a bond", loc="left", color=blue, fontsize=11)
counts = right.twinx()
counts.hist(lengths, bins=30, color="#e3e5e8")
counts.set(yticks=[], ylim=(0, 60))
counts.spines[:].set_visible(False)
right.set_zorder(counts.get_zorder() + 1)
right.patch.set_visible(False)
right.set(xlabel="distance", ylabel="error bar of the energy")
right.set_title("How well it is known", loc="left", color=blue, fontsize=11)
for axes, where in (
    (left, "upper right"),
    (middle, "upper right"),
    (right, "upper center"),
):
    axes.grid(color="#e3e5e8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc=where, fontsize=8)
plt.show()
