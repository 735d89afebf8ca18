r"""
Laplace approximation of the last layer, and its evidence
=========================================================

After this page you can turn the last layer of a trained network into a Bayesian one, choose its prior and its noise without
validation data, and get predictions whose error bars hold what they promise. The Laplace approximation takes the posterior
of the weights to be Gaussian around their most probable value :math:`\hat w`,

.. math:: w \sim \mathcal{N}(\hat w, A^{-1}), \qquad A = G + \delta I,

with the curvature :math:`G` of the negative log likelihood :math:`L` and a prior of precision :math:`\delta`. With it comes
the evidence, the probability of the data averaged over the prior (MacKay, Neural Computation 1992):

.. math:: \log p(y \mid \delta) \approx -L(\hat w) - \tfrac{\delta}{2} \lVert \hat w \rVert^2
          + \tfrac{D}{2} \log \delta - \tfrac{1}{2} \log \det A.

For a last layer with Gaussian noise both are exact, so that every number below can be checked.
"""

# %%
# Features and a last layer
# -------------------------
# The progress of diabetes of 442 patients from ten measurements. A network of fifty hidden units learns its features on 150
# of them. On a hundred others its last layer is made Bayesian; the rest are for testing. Many weights and few patients: a
# plain fit is too sure of itself.

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import multivariate_normal, norm
from sklearn.datasets import load_diabetes
from torch import nn

from curvalg import Problem, registry
from curvalg.estimate import effective_dimension
from curvalg_plugins.laplace import laplace

measurements, progress = load_diabetes(return_X_y=True)
X = torch.tensor(measurements / measurements.std(0))
y = torch.tensor((progress - progress.mean()) / progress.std())[:, None]
order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
features, train, test = order[:150], order[150:250], order[250:]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1)).double()
loss = nn.MSELoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(150):
    optimizer.zero_grad()
    loss(model(X[features]), y[features]).backward()
    optimizer.step()

problem = Problem(model, loss, (X[train], y[train]), params="2.*", cache=0)
N, D = problem.num_samples, problem.size

# %%
# The weights of the last layer will be moved many times, and each curvature used once or twice: with ``cache=0`` nothing is
# recorded for later.
#
# Fit and evidence
# ----------------
# :func:`~curvalg_plugins.laplace.laplace` makes the posterior. With noise of variance :math:`\sigma^2` its precision is
# :math:`N / 2 \sigma^2` times the curvature of the mean squared error, plus :math:`\delta`. In the last layer the outputs are
# linear, so that the GGN is the Hessian, and the most probable weights are one Newton step away from any others: the covariance
# of the posterior times the gradient of what it is the curvature of.


def fit(prior, noise):
    """Move the last layer to its most probable weights; the posterior around them."""
    before = laplace(problem, "ggn", prior=prior, sigma=noise**0.5)
    gradient = (
        before.likelihood.scale(before.sigma) * problem.gradient() + prior * before.mean
    )
    problem.step(before.covariance @ gradient)
    return laplace(problem, "ggn", prior=prior, sigma=noise**0.5)


def evidence(prior, noise):
    return fit(prior, noise).log_evidence()


print(f"{D} parameters of the last layer:", fit(0.1, 0.4))
hessian, ggn = (registry.build(name).lower(problem) for name in ("hessian", "ggn"))
torch.testing.assert_close(ggn.to_dense(), hessian.to_dense())

# %%
# Is that the probability of the data? The outputs are linear in the last layer, :math:`z = \Phi w` with the Jacobian
# :math:`\Phi`, so the targets are Gaussian with covariance :math:`\sigma^2 I + \Phi \Phi^\top / \delta`.

phi = registry.build("jacobian").lower(problem).to_dense()
for prior, noise in ((0.01, 0.3), (1.0, 0.5), (30.0, 1.0)):
    covariance = noise * torch.eye(N) + phi @ phi.T / prior
    direct = multivariate_normal(cov=covariance.numpy()).logpdf(y[train, 0].numpy())
    print(
        f"δ = {prior:5}, σ² = {noise}: log evidence {evidence(prior, noise):9.4f}, "
        f"directly {direct:9.4f}"
    )
    assert abs(evidence(prior, noise) - direct) < 1e-8 * abs(direct)

# %%
# Choosing prior and noise
# ------------------------
# Where the evidence is largest, :math:`\delta \lVert \hat w \rVert^2 = \gamma` and :math:`\sigma^2 = \lVert y - \Phi \hat w
# \rVert^2 / (N - \gamma)`, with the number of weights that the data determine, :math:`\gamma = \operatorname{tr} G (G +
# \delta I)^{-1}`. For weights as they are, ``tune_prior`` finds both; the weights move with them, so the two steps are
# repeated.

prior, noise = 1.0, 1.0
for _ in range(60):
    tuned = fit(prior, noise).tune_prior(noise=True)
    prior, noise = tuned.prior["2.weight"], tuned.sigma**2
ggn = tuned.likelihood.scale(tuned.sigma) * registry.build("ggn")
determined = effective_dimension(ggn.lower(problem), prior).value
print(
    f"δ = {prior:.3g}, σ² = {noise:.3g}, the data determine {determined:.1f} of {D} "
    "weights"
)
assert abs(prior * float(tuned.mean.square().sum()) - determined) < 1e-6

top = evidence(prior, noise)
for factor in (0.9, 1.1):
    assert evidence(factor * prior, noise) < top
    assert evidence(prior, factor * noise) < top
slope = (evidence(1.001 * prior, noise) - evidence(prior / 1.001, noise)) / (
    2 * np.log(1.001)
)
assert abs(slope) < 1e-3

# %%
# Predictions
# -----------
# The prediction for a new patient is Gaussian with variance :math:`\sigma^2 + \phi^\top A^{-1} \phi`: the noise, and what the
# hundred patients left open about the weights.


def predict(prior, noise):
    found = fit(prior, noise).predict(X[test])
    return found.mean[:, 0], found.variance[:, 0]


def test_loss(mean, variance):
    return -float(
        torch.distributions.Normal(mean, variance.sqrt()).log_prob(y[test, 0]).mean()
    )


def covered(mean, variance, level):
    width = norm.ppf(0.5 + level / 2) * variance.sqrt()
    return float(((y[test, 0] - mean).abs() < width).double().mean())


bayes = predict(prior, noise)
fit(1e-6, 1.0)
residual = problem.value()
with torch.no_grad():
    plain = (
        model(X[test])[:, 0],
        torch.full((len(test),), residual, dtype=torch.float64),
    )
levels = np.linspace(0.05, 0.95, 19)
coverage = {
    name: [covered(*found, level) for level in levels]
    for name, found in (("Bayesian", bayes), ("plain fit", plain))
}
losses = test_loss(*bayes), test_loss(*plain)
print(
    f"test loss {losses[0]:.2f}, of a plain fit with the variance of its residuals "
    f"{losses[1]:.2f}"
)
print(
    f"inside the 90 % intervals: {covered(*bayes, 0.9):.0%}, of a plain fit "
    f"{covered(*plain, 0.9):.0%}"
)

# %%
# The plain fit has next to no prior, and takes what it could not fit for the noise. Its intervals hold much less than they
# promise. The Bayesian ones are about right at every level, up to the scatter of a test on 192 patients, and its
# probabilities of the test data are much better. Its prior, which no test data have seen, is close to the best there is.

misses = {
    name: float(np.abs(np.array(found) - levels).max())
    for name, found in coverage.items()
}
print("largest miss:", ", ".join(f"{name} {miss:.2f}" for name, miss in misses.items()))
assert misses["Bayesian"] < 0.5 * misses["plain fit"]
assert all(
    found < level for found, level in zip(coverage["plain fit"], levels, strict=True)
)
assert losses[0] < losses[1] - 0.3

priors = np.logspace(-2, 4, 19)
evidences = np.array([evidence(other, noise) for other in priors])
tested = np.array([test_loss(*predict(other, noise)) for other in priors])
assert losses[0] < tested.min() + 0.05 < tested[[0, -1]].min()

blue, red, grey = "#0b3c5d", "#c8553d", "#9aa3ad"
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.5, 4.2), layout="constrained", width_ratios=(1.3, 1)
)
left.plot(
    priors,
    -evidences / N,
    color=blue,
    linewidth=2,
    label="− log evidence / N, training data",
)
left.plot(priors, tested, "--", color=red, linewidth=2, label="test loss")
left.axvline(prior, color=grey, linewidth=1.2, zorder=0)
left.text(
    prior * 1.2,
    0.98,
    "largest evidence",
    transform=left.get_xaxis_transform(),
    color="#5b6470",
    va="top",
)
left.set(xscale="log", xlabel="precision δ of the prior", ylabel="nats per patient")
left.set_title("The evidence knows a good prior", loc="left", color=blue)
left.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.92))
right.plot([0, 1], [0, 1], color=grey, linewidth=1.2)
for (name, found), colour, marker in zip(
    coverage.items(), (blue, red), "os", strict=True
):
    right.plot(levels, found, marker + "-", color=colour, markersize=4, label=name)
right.set(
    xlabel="promised",
    ylabel="found, of 192 test patients",
    xlim=(0, 1),
    ylim=(0, 1),
    aspect="equal",
)
right.set_title("Share inside the intervals", loc="left", color=blue)
right.legend(frameon=False, loc="upper left")
for axes in (left, right):
    axes.grid(color="#e3e5e8")
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# Classification
# --------------
# For a cross-entropy the same lines give the Laplace approximation proper, without :math:`\sigma^2`, with probabilities,
# and a fit of the last layer that takes several steps. The evidence is then approximate, and the posterior of a layer that
# separates its classes perfectly is far from Gaussian: it makes predictions too unsure.
