"""Outputs of every shape, and losses that do not fit them."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg import LossError, Problem, ProblemError
from curvalg.losses import CrossEntropy
from tests.support.dense import Case, Dense
from tests.support.field.models import (
    CE,
    TERMS,
    N,
    Post,
    R,
    S,
    X,
    Y,
    batches,
    ce,
    mlp,
    product,
    reference,
    rng,
)


def mse(z, y):
    return (z - y).square().reshape(len(y), -1).sum(1)


# -- outputs of every shape -----------------------------------------------------------------------------------------------------------------

LOSSES = [nn.MSELoss(), nn.HuberLoss(), nn.SmoothL1Loss(), nn.BCEWithLogitsLoss(), nn.PoissonNLLLoss()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_squeezed_regression_outputs_are_refused_not_broadcast(loss, build_net):
    column = nn.Linear(3, 1)
    flat = build_net(lambda: nn.Sequential(column, nn.Flatten(0)))
    y = torch.rand(N).double()
    with pytest.raises(LossError, match=rf"output \({N},\) and target \({N}, 1\).*reshape"):
        product("hessian", flat, loss, (X, y[:, None]))
    with pytest.raises(LossError, match=rf"output \({N}, 1\) and target \({N},\).*target.reshape\(\({N}, 1\)\)"):
        product("hessian", column.double(), loss, (X, y))


def test_squeezed_regression_outputs_under_a_callable_loss_are_refused(build_net):
    model = build_net(nn.Linear, 3, 1)
    with pytest.raises(LossError, match=r"coupled|repeated"):
        product("hessian", model, lambda z, y: (z - y).square().mean(), (X, R[:, 0]))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", ["hessian", "ggn", "covariance"])
def test_squeezed_regression_outputs_under_a_callable_of_declared_reduction_are_refused(name, build_net):
    """reduction= says nothing about the shape (N, N) to which (N, 1) and (N,) broadcast."""
    model = build_net(nn.Linear, 3, 1)
    with pytest.raises(LossError, match=r"shape|coupled|broadcast"):
        product(name, model, lambda z, y: F.mse_loss(z, y), (X, R[:, 0]), reduction="mean")


def test_squeezed_regression_outputs_that_agree(build_net, agrees):
    model = build_net(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1), nn.Flatten(0)))
    y = R[:, 0]
    agrees(Problem(model, nn.MSELoss(), batches(X, y)), Dense(Case(model, None, batches(X, y), mse, float(N))))


class Segmenter(nn.Module):
    """Classes of every pixel, (N, C, d1, d2)."""

    def __init__(self, volume=False) -> None:
        super().__init__()
        conv = nn.Conv3d if volume else nn.Conv2d
        self.a, self.b = conv(1, 2, 2, padding=1), conv(2, 3, 2)

    def forward(self, x):
        return self.b(F.softplus(self.a(x)))


@pytest.mark.parametrize("volume", [False, True])
@pytest.mark.parametrize("samples", ["item", "position"])
def test_outputs_with_classes_and_space(samples, volume, build_net, agrees):
    shape = (2, 2, 2) if volume else (2, 3)
    images, labels = (
        torch.randn(3, 1, *shape, generator=rng()).double(),
        torch.randint(0, 3, (3, *shape), generator=rng()),
    )
    model = build_net(Segmenter, volume)
    rows = (lambda z, y: ce(z, y).flatten(1).sum(1)) if samples == "item" else (lambda z, y: ce(z, y).reshape(-1))
    data = [(images[:1], labels[:1]), (images[1:], labels[1:])]
    expected = Dense(Case(model, None, data, rows, float(labels.numel())))
    agrees(Problem(model, CE, data, samples=samples), expected, terms=("hessian", "ggn", "covariance"))


def test_outputs_with_classes_last_are_told_their_axis(build_net):
    model = build_net(nn.Linear, 4, 3)
    labels = torch.zeros(N, 3).long()
    with pytest.raises(LossError, match="class_axis=-1"):
        product("ggn", model, CE, (torch.randn(N, 5, 4).double(), torch.zeros(N, 5).long()))
    product("ggn", model, CrossEntropy(class_axis=-1), (S, labels))


BAD_OUTPUTS = {
    "scalar": (lambda z: z.sum(), ProblemError, "scalar.*leading axis"),
    "integers": (lambda z: z.argmax(1), ProblemError, "floating-point tensor.*int64"),
    "booleans": (lambda z: z > 0, ProblemError, "floating-point tensor.*bool"),
    "a number": (lambda z: 1.0, ProblemError, "floating-point tensor.*float"),
    "nothing": (lambda z: None, ProblemError, "floating-point tensor.*NoneType"),
    "an array": (lambda z: z.detach().numpy(), ProblemError, "floating-point tensor.*ndarray"),
    "a dict": (lambda z: {"logits": z}, LossError, "dict.*forward="),
    "a tuple": (lambda z: (z, z), LossError, "tuple.*forward="),
    "a tuple of unequal lengths": (lambda z: (z, z[:1]), ProblemError, "leading axis.*forward="),
    "logits and loss": (lambda z: {"loss": z.sum(), "logits": z}, ProblemError, "leading axis.*forward="),
    "labels": (lambda z: z[:, 0], LossError, r"CrossEntropy.*\(6,\)"),
    "another batch size": (lambda z: z[:3], LossError, r"\(3,\).*\(3, 3\).*\(2,\)|shape"),
}


@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("kind", BAD_OUTPUTS)
def test_outputs_that_are_not_of_shape_n_c_are_explained(kind, name, build_net):
    post, error, message = BAD_OUTPUTS[kind]
    with pytest.raises(error, match=message):
        product(name, build_net(Post, post), CE, (X, Y))


class ModelOutput(OrderedDict):
    """As models of another library return: an ordered dict with attributes and a loss that is None."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def test_outputs_that_are_mappings_picked_by_forward(build_net, agrees):
    model = build_net(Post, lambda z: ModelOutput(loss=None, logits=z))
    with pytest.raises(LossError, match="forward="):
        product("ggn", model, CE, (X, Y))
    problem = Problem(model, CE, batches(), forward=lambda m, b: m(b[0]).logits)
    agrees(problem, reference(build_net(Post, lambda z: z)))
    data = [{"x": x, "labels": y} for x, y in batches()]
    agrees(Problem(model, CE, data, forward=lambda m, b: m(b["x"]).logits), reference(build_net(Post, lambda z: z)))


def test_outputs_that_are_mappings_under_a_callable_loss(build_net, agrees):
    model = build_net(Post, lambda z: ModelOutput(loss=None, logits=z, extra=z.exp()))
    problem = Problem(model, lambda out, y: F.cross_entropy(out["logits"], y) + 0 * out["extra"].sum(), batches())
    agrees(problem, reference(build_net(Post, lambda z: z)), terms=("hessian", "covariance"))


def test_outputs_with_attributes_under_a_callable_loss(build_net, agrees):
    """A loss written for a training loop reads output.logits: the structure arrives as the model made it."""
    model = build_net(Post, lambda z: ModelOutput(loss=None, logits=z))
    problem = Problem(model, lambda out, y: F.cross_entropy(out.logits, y), batches())
    agrees(problem, reference(build_net(Post, lambda z: z)), terms=("hessian", "covariance"))


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_outputs_that_are_not_finite_are_refused(build_net):
    for post in (lambda z: z / 0, lambda z: z * torch.nan):
        for name in TERMS:
            with pytest.raises(ProblemError, match="NaN or infinite"):
                product(name, build_net(Post, post), CE, (X, Y))


# -- losses that do not fit ---------------------------------------------------------------------------------------------------------------


BAD_LOSSES = {
    "not a scalar": (lambda z, y: ce(z, y), "scalar.*sum or average"),
    "a number": (lambda z, y: ce(z, y).mean().item(), "scalar tensor.*float"),
    "detached": (lambda z, y: ce(z, y).detach().mean(), "does not depend on the output"),
    "constant": (lambda z, y: y.double().square().mean(), "does not depend on the output"),
    "nothing": (lambda z, y: None, "scalar.*NoneType"),
}


@pytest.mark.parametrize("reduction", [None, "mean"])
@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_loss_that_is_not_a_scalar_of_the_output_is_explained(kind, name, reduction, build_net):
    loss, message = BAD_LOSSES[kind]
    with pytest.raises(LossError, match=message):
        product(name, build_net(mlp), loss, batches(), reduction=reduction)
