"""Curvature for laplace-torch, against its own backends; left out where it is not installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvalg import OptionError

laplace = pytest.importorskip("laplace")

from curvalg_plugins.laplace.backend import CurvalgGGN  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
D = torch.float64


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def loader(kind, batch):
    torch.manual_seed(1)
    y = torch.arange(20) % 3 if kind == "classification" else torch.randn(20, 3)
    return DataLoader(TensorDataset(torch.randn(20, 4), y), batch_size=batch)


def fitted(backend, kind, batch=8, **options):
    made = laplace.Laplace(network(), kind, prior_precision=0.8, backend=backend, **options)
    made.fit(loader(kind, batch))
    return made


@pytest.mark.parametrize("batch", [20, 8])
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("weights", ["all", "last_layer"])
@pytest.mark.parametrize(
    ("structure", "peer"), [("full", "CurvlinopsGGN"), ("kron", "CurvlinopsGGN"), ("diag", "BackPackGGN")]
)
def test_the_numbers_are_those_of_other_backends(structure, peer, weights, kind, batch):
    options = {"subset_of_weights": weights, "hessian_structure": structure, "batch": batch}
    theirs, mine = (fitted(b, kind, **options) for b in (getattr(laplace.curvature, peer), CurvalgGGN))
    assert float(mine.log_marginal_likelihood()) == pytest.approx(float(theirs.log_marginal_likelihood()), abs=1e-8)
    asked = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    for a, b in zip(mine._glm_predictive_distribution(asked), theirs._glm_predictive_distribution(asked), strict=True):
        torch.testing.assert_close(a, b)


def test_jacobians_and_a_subnetwork():
    x = torch.randn(6, 4)
    net = network()
    mine, theirs = CurvalgGGN(net, "classification"), laplace.curvature.CurvlinopsGGN(net, "classification")
    for a, b in zip(mine.jacobians(x), theirs.jacobians(x), strict=True):
        torch.testing.assert_close(a, b)
    chosen = torch.tensor([0, 3, 30, 41])
    options = {"subset_of_weights": "subnetwork", "hessian_structure": "full", "subnetwork_indices": chosen}
    theirs, mine = (fitted(b, "classification", **options) for b in (laplace.curvature.CurvlinopsGGN, CurvalgGGN))
    torch.testing.assert_close(mine.H, theirs.H)
    assert mine.H.shape == (4, 4)


def test_draws_are_left_to_others():
    with pytest.raises(OptionError, match="stochastic"):
        CurvalgGGN(network(), "classification", stochastic=True)


def test_parameters_may_move_between_fits():
    net = network()
    made = laplace.Laplace(net, "classification", "all", "kron", backend=CurvalgGGN)
    made.fit(loader("classification", 8))
    with torch.no_grad():
        net[0].weight.mul_(2)
    again = laplace.Laplace(net, "classification", "all", "kron", backend=CurvalgGGN)
    again.fit(loader("classification", 8))
    made.fit(loader("classification", 8))
    assert float(made.log_marginal_likelihood()) == pytest.approx(float(again.log_marginal_likelihood()))


def test_normalisations_have_blocks_of_their_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    made = laplace.Laplace(net, "classification", "all", "kron", backend=CurvalgGGN)
    made.fit(loader("classification", 20))
    assert made.predictive_samples(torch.randn(2, 4), n_samples=3).shape == (3, 2, 3)
