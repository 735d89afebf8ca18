"""Gradients of curvature equal those of dense matrices made by hand, and central differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev

from curvalg import (
    CurvalgError,
    ExpressionError,
    FactsError,
    LossError,
    OptionError,
    Problem,
    ProblemError,
    StaleError,
    differentiable,
    registry,
)

build = registry.build
WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 0, -100, 1, 2])


class Norm(nn.Module):
    """LayerNorm in elementary operations: torch.func's own derivatives of the fused one are wrong."""

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 9), nn.Linear(3, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v)).mean(1)


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Norm(), nn.Linear(4, 3)), torch.randn(7, 3)


def cnn():
    layers = nn.Conv2d(1, 2, 3), nn.GELU(), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers).eval(), torch.randn(7, 1, 4, 4)


def attention():
    return Attention(), torch.randn(7, 5, 3)


MODELS = {"mlp": mlp, "cnn": cnn, "attention": attention}


class Dense:
    """Matrices as functions of the flat parameters, by torch.func."""

    def __init__(self, model, *, weight=WEIGHTS):
        torch.manual_seed(0)
        self.net, X = MODELS[model]()
        self.net, self.X = self.net.double(), X.double()
        self.loss = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1)
        data = [(self.X[:4], LABELS[:4]), (self.X[4:], LABELS[4:])]
        self.problem = Problem(self.net, self.loss, data)
        self.weight, self.size = weight, self.problem.size
        self.theta = torch.cat([p.detach().reshape(-1) for p in self.net.parameters()])

    def output(self, theta):
        return functional_call(self.net, self.problem.layout.unflatten(theta), (self.X,))

    def _value(self, z):
        return F.cross_entropy(z, LABELS, weight=self.weight.detach(), label_smoothing=0.1)

    def hessian(self, theta):
        return jacrev(jacrev(lambda t: self._value(self.output(t))))(theta)

    def ggn(self, theta):
        J, B = jacrev(self.output)(theta), jacrev(jacrev(self._value))(self.output(theta))
        return torch.einsum("nad,naMb,Mbe->de", J, B, J)

    def residual(self, theta):
        return self.hessian(theta) - self.ggn(theta)

    def covariance(self, theta):
        def shares(t):
            each = F.cross_entropy(
                self.output(t), LABELS, weight=self.weight.detach(), label_smoothing=0.1, reduction="none"
            )
            return each / self.weight.detach()[LABELS[LABELS >= 0]].sum()

        g = jacrev(shares)(theta)
        return 6 * g.T @ g

    def centered_covariance(self, theta):
        mean = grad(lambda t: self._value(self.output(t)))(theta)
        return self.covariance(theta) - torch.outer(mean, mean)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("term", ["hessian", "ggn", "residual", "covariance", "centered_covariance"])
def test_quadratic_forms(model, term):
    dense = Dense(model)
    left, right = torch.randn(2, dense.size, 3).double()
    matrix = getattr(dense, term)
    expected = grad(lambda t: (left * (matrix(t) @ right)).sum())(dense.theta)
    op = build(term).lower(dense.problem)
    got = op.quadratic_form_gradient(left, right)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    step, direction = 1e-5, torch.randn(dense.size).double()
    above, below = ((left * (matrix(dense.theta + s * step * direction) @ right)).sum() for s in (1, -1))
    assert abs(float(got @ direction) - float(above - below) / (2 * step)) <= 1e-6 * float(got.norm())


def number_of(name, problem, damping, covariance):
    if name == "tic":
        return differentiable.tic(problem, hessian=build("ggn"), covariance=build(covariance), damping=damping)
    quantity = getattr(differentiable, name)
    return quantity(build("ggn") + 0.5 * build(covariance), problem, damping=damping)


def dense_number(name, dense, theta, damping, covariance):
    G, C = dense.ggn(theta), getattr(dense, covariance)(theta)
    A = (G if name == "tic" else G + 0.5 * C) + torch.diag(damping)
    return {
        "trace": lambda: A.trace(),
        "logdet": lambda: torch.logdet(A),
        "top_eigenvalue": lambda: torch.linalg.eigvalsh(A)[-1],
        "tic": lambda: torch.linalg.solve(A, C).trace(),
    }[name]()


@pytest.mark.parametrize("covariance", ["covariance", "centered_covariance"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["trace", "logdet", "top_eigenvalue", "tic"])
def test_numbers_and_their_gradients(name, model, covariance):
    dense = Dense(model)
    raw = (0.1 * torch.randn(dense.size)).double().requires_grad_()
    value = number_of(name, dense.problem, raw.exp(), covariance)
    (3 * value).backward()
    theta, prior = dense.theta.clone().requires_grad_(), raw.detach().clone().requires_grad_()
    expected = dense_number(name, dense, theta, prior.exp(), covariance)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0.0)
    (3 * expected).backward()
    got = torch.cat([p.grad.reshape(-1) for p in dense.net.parameters()])
    torch.testing.assert_close(got, theta.grad, rtol=1e-7, atol=1e-8 * float(theta.grad.abs().max()))
    torch.testing.assert_close(raw.grad, prior.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("term", ["hessian", "centered_covariance"])
def test_class_weights_get_gradients(term):
    def value(weight):
        return differentiable.trace(build(term), Dense("mlp", weight=weight).problem)

    weight = WEIGHTS.clone().requires_grad_()
    value(weight).backward()
    for k in range(3):
        unit = torch.zeros(3).double()
        unit[k] = 1e-5
        difference = float((value(WEIGHTS + unit) - value(WEIGHTS - unit)).detach()) / 2e-5
        assert float(weight.grad[k]) == pytest.approx(difference, rel=1e-6, abs=1e-8)


class Tempered(nn.Module):
    """A temperature that is no parameter, and one that is not chosen."""

    def __init__(self, temperature):
        super().__init__()
        self.first, self.second, self.raw = nn.Linear(3, 4), nn.Linear(4, 3), temperature

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.raw.exp()


@pytest.mark.parametrize("kind", ["attribute", "not chosen", "in the loss"])
def test_everything_that_model_and_loss_depend_on_gets_gradients(kind):
    def problem_of(t):
        torch.manual_seed(0)
        inside = kind != "in the loss"
        net = Tempered(t if inside else torch.zeros(())).double()
        if kind == "not chosen":
            net.raw = nn.Parameter(t.detach().clone())

        def loss(z, y):
            return F.cross_entropy(z if inside else z * t.exp(), y)

        data = [(torch.randn(n, 3).double(), torch.randint(3, (n,))) for n in (4, 3)]
        return net, Problem(net, loss, data, params=["first.*", "second.*"], reduction="mean")

    t = torch.tensor(0.3).double().requires_grad_()
    net, problem = problem_of(t)
    differentiable.logdet(build("hessian"), problem, damping=3.0).backward()
    sides = []
    for step in (1e-5, -1e-5):
        moved = problem_of(t.detach() + step)[1]
        H = build("hessian").lower(moved).to_dense()
        sides.append(float(torch.logdet(H + 3 * torch.eye(len(H)).double())))
    got = net.raw.grad if kind == "not chosen" else t.grad
    assert float(got) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6)


def test_vectors_get_gradients():
    dense = Dense("mlp")
    left, right = (torch.randn(dense.size).double().requires_grad_() for _ in range(2))
    differentiable.quadratic_form(build("hessian"), dense.problem, left, right, damping=0.3).backward()
    A = dense.hessian(dense.theta) + 0.3 * torch.eye(dense.size).double()
    torch.testing.assert_close(left.grad, A @ right.detach())
    torch.testing.assert_close(right.grad, A @ left.detach())


def test_training_by_curvature():
    """The top eigenvalue falls when it is descended, step after step on a moving model."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    problem = Problem(net, nn.MSELoss(), (torch.randn(9, 2).double(), torch.randn(9, 1).double()))
    values = []
    for _ in range(6):
        net.zero_grad()
        value = differentiable.top_eigenvalue(build("ggn"), problem)
        value.backward()
        values.append(float(value.detach()))
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.02 * p.grad
    assert all(b < a for a, b in zip(values, values[1:], strict=False))


class WrongThird(torch.autograd.Function):
    """x³ whose second derivative is right once and wrong from then on."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * Planted.apply(x)


class Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 2 * (x + 0.3 * (x - x.detach()))  # right in value, its own derivative is not


class Cubed(nn.Module):
    def forward(self, x):
        return WrongThird.apply(x)


class Once(nn.Module):
    def forward(self, x):
        return torch.cdist(x[:, None], x.new_zeros(1, 1, x.shape[1]), p=3.0)[:, 0] * x


@pytest.mark.parametrize("layer", [Cubed, Once])
def test_models_without_right_third_derivatives_are_refused(layer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), layer(), nn.Linear(3, 2)).double()
    problem = Problem(net, nn.MSELoss(), (torch.randn(5, 2).double(), torch.randn(5, 2).double()))
    with pytest.raises(ProblemError, match="derivative"):
        differentiable.trace(build("hessian"), problem).backward()


def test_relu_networks_have_derivatives():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    problem = Problem(net, nn.MSELoss(), (torch.randn(5, 2).double(), torch.randn(5, 2).double()))
    differentiable.trace(build("ggn"), problem).backward()
    assert float(net[0].weight.grad.norm()) > 0


@pytest.mark.parametrize("term", ["ggn", "hessian", "covariance"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh])
def test_a_state_on_a_kink_is_named_as_that(activation, term):
    """A zero row and zero biases: the inputs of the activation are exactly where its pieces meet."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), activation(), nn.Linear(8, 2)).double()
    X, y = torch.randn(5, 2).double(), torch.randn(5, 2).double()
    with torch.no_grad():
        net[0].bias.fill_(1.0 if activation is nn.Hardtanh else 0.0)  # Hardtanh has its kinks at -1 and 1
    X[0] = 0
    with pytest.raises(ProblemError, match=r"on a kink.*exactly zero before a ReLU.*verify=False"):
        differentiable.trace(build(term), Problem(net, nn.MSELoss(), (X, y))).backward()
    differentiable.trace(build(term), Problem(net, nn.MSELoss(), (X[1:], y[1:]))).backward()
    differentiable.trace(build(term), Problem(net, nn.MSELoss(), (X, y), verify=False)).backward()


def test_a_kink_hides_no_wrong_third_derivative():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), Cubed(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        net[0].bias.zero_()
    X, y = torch.randn(5, 2).double(), torch.randn(5, 2).double()
    X[0] = 0
    with pytest.raises(ProblemError, match="derivatives of the model are wrong"):
        differentiable.trace(build("hessian"), Problem(net, nn.MSELoss(), (X, y))).backward()


def test_what_has_no_derivative_is_refused_by_name():
    problem = Dense("mlp").problem
    for name in ("kfac", "ggn_diagonal"):
        with pytest.raises(ExpressionError, match=f"{name}.* take the matrix that it approximates"):
            differentiable.trace(build(name), problem)
    with pytest.raises((LossError, CurvalgError), match="Monte-Carlo"):
        differentiable.trace(build("ggn_mc"), problem).backward()
    with pytest.raises(FactsError, match="positive definite"):
        differentiable.logdet(build("hessian"), problem, damping=-5.0)
    with pytest.raises(OptionError, match=r"first\.weight|missing"):
        differentiable.logdet(build("ggn"), problem, damping={"a": 1.0})
    with pytest.raises(OptionError, match="damping"):
        differentiable.logdet(build("ggn"), problem, damping=torch.ones(3))
    with pytest.raises(OptionError, match="probes"):
        differentiable.trace(build("ggn"), problem, probes=0)


def test_double_eigenvalues_are_refused():
    net = nn.Linear(2, 2, bias=False).double()
    problem = Problem(net, nn.MSELoss(), (torch.eye(2).double(), torch.zeros(2, 2).double()))
    with pytest.raises(FactsError, match="two largest"):
        differentiable.top_eigenvalue(build("ggn"), problem)


def test_a_model_that_moved_before_backward_is_stale():
    dense = Dense("mlp")
    value = differentiable.trace(build("ggn"), dense.problem)
    with torch.no_grad():
        dense.net[0].weight.add_(1)
    with pytest.raises(StaleError):
        value.backward()


def test_nothing_of_the_users_changes():
    dense = Dense("cnn")
    before = {name: t.clone() for name, t in dense.net.state_dict().items()}
    state = torch.get_rng_state()
    build("hessian").lower(dense.problem).quadratic_form_gradient(torch.ones(dense.size), torch.ones(dense.size))
    assert all(p.grad is None for p in dense.net.parameters())
    assert all(torch.equal(before[name], t) for name, t in dense.net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_gradients_have_no_graph_and_say_so():
    dense = Dense("mlp")
    value = differentiable.trace(build("hessian"), dense.problem)
    with pytest.raises(ProblemError, match="create_graph"):
        torch.autograd.grad(value, dense.net[0].weight, create_graph=True)


@pytest.mark.parametrize("term", ["hessian", "ggn", "residual", "covariance"])
@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss(), nn.MSELoss()])
def test_models_that_are_linear_in_their_parameters(loss, term):
    torch.manual_seed(0)
    net = nn.Linear(3, 1).double()
    X, y = torch.randn(6, 3).double(), torch.rand(6, 1).double()
    problem, flat = Problem(net, loss, (X, y)), torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    one = torch.cat([X, torch.ones(6, 1).double()], 1)

    def matrix(w):
        z = (one @ w)[:, None]
        if term == "covariance":
            g = torch.stack([jacrev(lambda z, n=n: loss(z, y[n]))(z[n])[0] for n in range(6)])
            return (one * g.square()[:, None]).T @ one / 6
        curvature = torch.stack([jacrev(jacrev(lambda z, n=n: loss(z, y[n])))(z[n])[0, 0] for n in range(6)])
        return (one * curvature[:, None]).T @ one / 6 * (0.0 if term == "residual" else 1.0)

    left, right = torch.randn(2, 4, 2).double()
    expected = jacrev(lambda w: (left * (matrix(w) @ right)).sum())(flat)
    got = build(term).lower(problem).quadratic_form_gradient(left, right)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
