r"""
Writing a plugin
================

After this page you can add a curvature matrix of your own to curvalg: write it as one class, give it a name, have its
contract checked, use it in expressions beside the built-in ones, and ship it. The example weighs samples by how wrong the
model is about them: with the gradient :math:`\nabla c_n` of a sample's share of the loss,

.. math:: U_\gamma = s \sum_n (1 - p_n)^\gamma \, \nabla c_n \nabla c_n^\top ,

where :math:`p_n` is the probability that the model gives to the label, and :math:`s` the number of samples for a mean loss.
With :math:`\gamma = 0` this is the built-in ``covariance``; a larger :math:`\gamma` leaves the hard examples, with the
weights of the focal loss (Lin et al., arXiv 1708.02002).
"""

# %%
# The class
# ---------
# A term is a frozen dataclass, whose fields are its options. ``cotangent_dot`` gets :math:`\dot z = J v` and returns what
# :math:`J^\top` is applied to. Here that is :math:`s \, q_n (q_n^\top \dot z_n)` with
# :math:`q_n = (1 - p_n)^{\gamma / 2} r_n` and the gradient :math:`r_n` of the sample's share in output space. What a batch
# hands out carries the denominator of the whole data set already, so a term never divides by a batch's size.
#
# ``factor`` is optional. It gives columns with whose outer products the matrix is made, and with them exact inverses.

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvalg import (
    Diagonal,
    Facts,
    Identity,
    LossError,
    MatrixTerm,
    OptionError,
    Problem,
    Term,
    inverse,
    registry,
)
from curvalg.testing import check_term


def weighted_gradient(batch, power):
    """(1 − p)^(power / 2) r, of the output's shape, with the label's probability p."""
    axis = batch.class_axis
    p = batch.output.softmax(axis).gather(axis, batch.labels.unsqueeze(axis))
    return (1 - p).clamp_min(0) ** (power / 2) * batch.loss_gradient


def require_classes(term, loss):
    if loss is None or not loss.classes:
        raise LossError(
            f"{term.label} is defined for losses with classes, such as "
            "nn.CrossEntropyLoss"
        )


@dataclass(frozen=True)
class HardCovariance(Term):
    """Gradient covariance for hard samples, s Σₙ (1 − pₙ)^power ∇cₙ ∇cₙᵀ (D × D).

    Args:
        power: how much hard samples count; 0 gives ``covariance``.
    """

    power: float = 1.0

    def __post_init__(self):
        if not 0 <= self.power < float("inf"):
            raise OptionError(
                "hard_covariance: power must be a finite number ≥ 0, got "
                f"{self.power!r}"
            )

    def validate(self, loss):
        require_classes(self, loss)

    def facts(self, loss=None):
        return Facts(psd=True)

    def cotangent_dot(self, batch, tangent):
        q = weighted_gradient(batch, self.power)
        return batch.scale * q * batch.dot(q, tangent)

    def factor(self, batch):
        return batch.per_sample_columns(
            batch.scale**0.5 * weighted_gradient(batch, self.power)[None]
        )


# %%
# Its name, and its checks
# ------------------------
# ``registry.register`` gives a class a name in the running program; inside ``registry.scoped`` the name is gone at the end
# of the ``with`` block, which suits tests. ``check_term`` runs the conformance kit: linearity, symmetry, batches cut in any
# way, several columns at once, restrictions, reading back what is printed, and more. This page gives it one small problem,
# with four classes at each of three positions; without ``problems`` it takes several of its own, which suits a test suite.

torch.manual_seed(0)
tagger = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Tanh(), nn.Conv1d(3, 4, 1)).double()
sentences, tags = torch.randn(5, 2, 3, dtype=torch.float64), torch.randint(0, 4, (5, 3))
sequences = Problem(tagger, nn.CrossEntropyLoss(), (sentences, tags))

with registry.scoped():
    registry.register("hard_covariance", HardCovariance)
    check_term("hard_covariance(power=2)", problems=[sequences])
    print(registry.describe("hard_covariance"))
assert "hard_covariance" not in registry.names()

# %%
# The kit finds what a first test on one's own network does not. Multiply the weight outside the inner product instead:
# for one label per sample nothing changes, but where a sample has several positions, as tokens, the matrix is not
# symmetric any more.


@dataclass(frozen=True)
class Lopsided(HardCovariance):
    """The weight outside of the inner product."""

    def cotangent_dot(self, batch, tangent):
        r = batch.loss_gradient
        return (
            batch.scale
            * weighted_gradient(batch, 2 * self.power)
            * batch.dot(r, tangent)
        )

    def factor(self, batch):
        return None


failures = {}
try:
    check_term(Lopsided(power=2), problems=[sequences])
except AssertionError as error:
    failures = error.failures
print(f"adjoint: {failures['adjoint']}")
assert "adjoint" in failures

# %%
# An explicit matrix
# ------------------
# A ``MatrixTerm`` accumulates statistics over the batches and finishes them as a structured expression. The diagonal of
# the same matrix takes a few lines: ``batch.layers`` gives the gradients of given columns layer by layer, and
# ``squares`` the sums of their squares.


@dataclass(frozen=True)
class HardCovarianceDiagonal(MatrixTerm):
    """Diagonal of ``hard_covariance`` (D × D).

    Args:
        power: as of ``hard_covariance``.
    """

    power: float = 1.0

    def validate(self, loss):
        require_classes(self, loss)

    def facts(self, loss=None):
        return Facts(psd=True)

    def accumulate(self, batch, prepared=None):
        columns = HardCovariance(self.power).factor(batch)
        return {
            name: squares
            for record in batch.layers(columns)
            for name, squares in record.squares().items()
        }

    def finish(self, stats, layout, prepared=None):
        return Diagonal(layout.flatten(stats))


check_term(HardCovarianceDiagonal(power=2), problems=[sequences])

# %%
# In expressions
# --------------
# On a real problem the new terms add, multiply and print like built-in ones.

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images / 16), torch.tensor(labels)
model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(2):
    for rows in torch.randperm(len(X)).split(64):
        optimizer.zero_grad()
        loss(model(X[rows]), y[rows]).backward()
        optimizer.step()

rows = slice(0, 400)
problem = Problem(
    model, loss, list(zip(X[rows].split(150), y[rows].split(150), strict=True))
)

registry.register("hard_covariance", HardCovariance)
registry.register("hard_covariance_diagonal", HardCovarianceDiagonal)
hard = registry.build("hard_covariance", power=2)
ggn, covariance = registry.build("ggn"), registry.build("covariance")
expr = 2 * ggn + hard - 0.5 * covariance
print(expr)

# %%
# The sum is one sweep over the data, and stays one whatever is added to it:

op = expr.lower(problem)
print(op.explain())
assert op.explain().count("sweep:") == 1

# %%
# Is it the right matrix?
# -----------------------
# A reference for the tests should share nothing with the term: here gradients of single samples, by ``torch.func``.

parameters = {name: p.detach() for name, p in model.named_parameters()}


def sample_loss(parameters, x, label):
    return loss(torch.func.functional_call(model, parameters, (x,)), label)


gradients = torch.func.vmap(torch.func.grad(sample_loss), (None, 0, 0))(
    parameters, X[rows], y[rows]
)
gradients = torch.cat([gradients[name].flatten(1) for name in parameters], 1)
with torch.no_grad():
    p = model(X[rows]).softmax(1)[range(400), y[rows]]
reference = gradients.T @ ((1 - p)[:, None] ** 2 * gradients) / 400

torch.testing.assert_close(hard.lower(problem).to_dense(), reference)
diagonal = registry.build("hard_covariance_diagonal", power=2).lower(problem)
torch.testing.assert_close(diagonal.to_dense(), reference.diagonal().diag())
torch.testing.assert_close(
    registry.build("hard_covariance", power=0).lower(problem).to_dense(),
    covariance.lower(problem).to_dense(),
)

# %%
# ``factor`` pays here: the damped inverse is exact, without any iteration.

solver = inverse(hard + 1e-3 * Identity).lower(problem)
step = solver @ problem.gradient()
expected = torch.linalg.solve(
    reference + 1e-3 * torch.eye(problem.size, dtype=torch.float64), problem.gradient()
)
torch.testing.assert_close(step, expected)
assert solver.last_solve.iterations.max() == 0

# %%
# Shipping it
# -----------
# Installed as a package, a term needs no ``register``. An entry point names it, ``curvalg terms`` lists it, and nothing is
# imported before it is built:
#
# .. code-block:: toml
#
#    [project]
#    name = "curvalg-hard-covariance"
#    version = "0.1.0"
#    dependencies = ["curvalg>=0.1", "torch"]
#
#    [project.entry-points."curvalg.terms"]
#    hard_covariance = "curvalg_hard_covariance:HardCovariance"
#    hard_covariance_diagonal = "curvalg_hard_covariance:HardCovarianceDiagonal"
#
# In its test suite ``curvalg.testing.parametrize_terms(["hard_covariance(power=2)"])`` makes one test of every check. The
# folder ``gallery/plugin_template`` is a complete distribution to copy: the module, ``pyproject.toml`` and the tests.

# %%
# What it shows
# -------------
# The weights concentrate the matrix on fewer samples, and lower its eigenvalues. Most of the space of its ten leading
# eigenvectors is that of the covariance's ten, in another order and mixed.

powers = (0, 1, 4)
pairs = {
    power: registry.build("hard_covariance", power=power).lower(problem).exact("eigh")
    for power in powers
}
halves = []
for power in powers:
    shares = (1 - p) ** power * gradients.square().sum(1)
    half = (
        int((shares.sort(descending=True).values.cumsum(0) < shares.sum() / 2).sum())
        + 1
    )
    halves.append(half)
    print(f"power {power}: {half} of 400 samples make half of the trace")
assert halves == sorted(halves, reverse=True)

top = {power: pairs[power].vectors(slice(-10, None)).flip(1) for power in (0, 4)}
overlap = (top[0].T @ top[4]).square()
assert 5 < overlap.sum() < 10
print(
    "share of the hard ten within the ten of the covariance "
    f"{float(overlap.sum()) / 10:.2f}"
)

figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.5, 4.2), layout="constrained", width_ratios=(1.25, 1)
)
for power, colour in zip(powers, ("#0b3c5d", "#5b8db8", "#c8553d"), strict=True):
    values = pairs[power].eigenvalues.flip(0)[:60]
    label = "covariance" if power == 0 else f"hard_covariance(power={power})"
    left.plot(
        np.arange(1, len(values) + 1),
        values,
        "o-",
        color=colour,
        markersize=3,
        linewidth=1,
        label=label,
    )
left.set(yscale="log", xlabel="eigenvalue number", ylabel="eigenvalue")
left.grid(axis="y", color="#e3e5e8")
left.spines[["top", "right"]].set_visible(False)
left.legend(frameon=False)
left.set_title("Largest eigenvalues", loc="left", color="#0b3c5d")
picture = right.imshow(overlap, cmap="Blues", vmin=0, vmax=1)
ticks = np.arange(0, 10, 3)
right.set(xticks=ticks, xticklabels=ticks + 1, yticks=ticks, yticklabels=ticks + 1)
right.set(
    xlabel="eigenvector of hard_covariance(power=4)", ylabel="eigenvector of covariance"
)
right.set_title("Squared cosines", loc="left", color="#0b3c5d")
figure.colorbar(picture, ax=right, shrink=0.85)
plt.show()
