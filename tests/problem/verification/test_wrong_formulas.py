"""Operations and hooks whose formulas are wrong or missing: replaced by what is right, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvalg import Problem, ProblemError, registry
from tests.support.small_net import MSE, Net, data

ROUTES = [{}, {"cache": 0}, {"columns": "loop"}, {"factored": True}]


def jacobian(model, x):
    params = list(model.parameters())
    rows = [torch.autograd.grad(e, params, retain_graph=True, allow_unused=True) for e in model(x).reshape(-1)]
    flat = [
        torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(row, params)]) for row in rows
    ]
    return torch.stack(flat)


def by_differences(model, f, h=1e-6):
    """Columns of the derivative of f() in the parameters, by central differences of the live model."""
    columns = []
    for p in model.parameters():
        flat = p.data.view(-1)
        for i in range(len(flat)):
            old = flat[i].item()
            flat[i] = old + h
            above = f().detach().reshape(-1).clone()
            flat[i] = old - h
            below = f().detach().reshape(-1).clone()
            flat[i] = old
            columns.append((above - below) / (2 * h))
    return torch.stack(columns, 1)


def gradient(model, x, y):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(MSE(model(x), y), list(model.parameters()))])


# -- operations whose formulas are wrong or missing ---------------------------------------------------------------------


def product_pool(h):
    index = torch.tensor([0, 0, 1, 1]).expand(len(h), -1)
    return torch.ones(len(h), 4).double().scatter_reduce(1, index, torch.tanh(h), "prod", include_self=False)


def cholesky_inverse(h):
    a = torch.diag_embed(h.square() + 1)
    a = a + 0.1 * torch.tril(torch.ones(4, 4).double(), -1)
    return torch.cholesky_inverse(torch.linalg.cholesky(a @ a.mT)).diagonal(dim1=-2, dim2=-1)


class ForwardHalf(torch.autograd.Function):
    """tanh with a wrong forward-mode formula."""

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)

    @staticmethod
    def jvp(ctx, t):
        (y,) = ctx.saved_tensors
        return 0.5 * t * (1 - y * y)


class Once(torch.autograd.Function):
    """tanh with a first derivative alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0] ** 2)


class Detached(torch.autograd.Function):
    """tanh whose backward hides a dependence from a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        return (g.detach() * (1 - ctx.saved_tensors[0] ** 2)) + 0 * g


FIRST_ORDER = {
    "scatter_reduce prod": product_pool,
    "cholesky_inverse": cholesky_inverse,
    "logcumsumexp": lambda h: torch.logcumsumexp(h, 1),
    "wrong jvp": ForwardHalf.apply,
    "once differentiable": Once.apply,
    "detached cotangent": Detached.apply,
    "cdist": lambda h: torch.cdist(h[:, None], torch.arange(16.0).double().sin().reshape(1, 4, 4)).squeeze(1),
    "hardsigmoid": F.hardsigmoid,
}


@pytest.mark.parametrize("options", ROUTES, ids=str)
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_order_matrices_are_right_whatever_the_second_derivative(name, options):
    """J, the GGN and the covariance need the first derivative alone, and a wrong route to it is replaced."""
    model = Net(FIRST_ORDER[name])
    x, y = data()
    J, r = jacobian(model, x), (model(x) - y).detach()
    problem = Problem(model, MSE, (x, y), **options)
    eye = torch.eye(problem.size).double()
    ggn = J.T @ J * 2 / y.numel()
    per_sample = torch.einsum("nc,ncd->nd", 2 * r / y.shape[1], J.reshape(*y.shape, -1))
    expected = {"ggn": ggn, "covariance": per_sample.T @ per_sample / len(x)}
    for term, matrix in expected.items():
        op = registry.build(term).lower(problem)
        assert torch.allclose(op @ eye, matrix, atol=1e-10), term
        assert torch.allclose(torch.stack([op @ v for v in eye], 1), matrix, atol=1e-10), term
    assert torch.allclose(registry.build("jacobian").lower(problem) @ eye, J, atol=1e-12)
    assert torch.allclose(registry.build("jacobian").lower(problem).to_dense(), J, atol=1e-12)
    assert torch.allclose(registry.build("jacobian").lower(problem) @ eye[0], J[:, 0], atol=1e-12)


def test_without_verification_the_wrong_formula_shows():
    """The checks are what finds it: left out, the number is wrong (and explain() says that they were left out)."""
    model = Net(ForwardHalf.apply)
    x, y = data()
    v = torch.ones(26).double()
    op = registry.build("jacobian").lower(Problem(model, MSE, (x, y), verify=False))
    assert not torch.allclose(op @ v, jacobian(model, x) @ v)
    assert "not verified" in op.explain()
    checked = registry.build("jacobian").lower(Problem(model, MSE, (x, y)))
    assert torch.allclose(checked @ v, jacobian(model, x) @ v)
    assert "J v disagrees with the gradient" in checked.explain()


def test_embedding_bags_have_first_order_matrices():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.out = nn.EmbeddingBag(6, 3, mode="mean").double(), nn.Linear(3, 2).double()

        def forward(self, tokens):
            return self.out(torch.tanh(self.bag(tokens)))

    model, tokens, y = Bag(), torch.tensor([[0, 1, 1], [2, 5, 2]]), torch.randn(2, 2).double()
    J = jacobian(model, tokens)
    op = registry.build("ggn").lower(Problem(model, MSE, (tokens, y)))
    assert torch.allclose(op @ torch.eye(26).double(), J.T @ J * 2 / 4, atol=1e-12)


# -- gradients that are altered -------------------------------------------------------------------------------------------


def scaling_hook(h):
    h = torch.tanh(h)
    if h.requires_grad:
        h.register_hook(lambda g: -0.5 * g)
    return h


def clipping_hook(h):
    h = torch.tanh(h)
    if h.requires_grad:
        h.register_hook(lambda g: g.clamp(-1e-2, 1e-2))
    return h


@pytest.mark.parametrize("options", ROUTES, ids=str)
def test_a_linear_hook_gives_one_matrix_on_all_routes(options):
    model = Net(scaling_hook)
    x, y = data()
    J = jacobian(model, x)
    op = registry.build("ggn").lower(Problem(model, MSE, (x, y), **options))
    eye = torch.eye(26).double()
    assert torch.allclose(op @ eye, J.T @ J * 2 / y.numel(), atol=1e-12)
    assert torch.allclose(torch.stack([op @ v for v in eye], 1), op @ eye, atol=1e-12)


def test_a_hook_that_is_not_linear_is_refused():
    x, y = data()
    with pytest.raises(ProblemError, match="hook"):
        registry.build("ggn").lower(Problem(Net(clipping_hook), MSE, (x, y))) @ torch.ones(26).double()


class Rounds(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("operation", [lambda h: Rounds.apply(h).square(), lambda h: Detached.apply(h), scaling_hook])
def test_second_derivatives_of_what_is_no_derivative_are_refused(operation):
    x, y = data()
    with pytest.raises(ProblemError, match="second derivative"):
        registry.build("hessian").lower(Problem(Net(operation), MSE, (x, y))) @ torch.ones(26).double()


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(4),
        nn.BatchNorm1d(4).eval(),
        nn.BatchNorm1d(4),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
        nn.InstanceNorm1d(5, affine=True),
    ],
    ids=lambda m: type(m).__name__ + ("" if not isinstance(m, nn.BatchNorm1d) or m.training else " eval"),
)
def test_normalisations_inside_forces_have_right_hessians(norm):
    """Their fused double backward is wrong inside a graph that is differentiated a third time (torch 2.13)."""

    class Potential(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(3, 4), norm, nn.Linear(4, 1)

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                h = self.first(x)
                h = self.norm(h[None])[0] if isinstance(self.norm, nn.InstanceNorm1d) else self.norm(h)
                energy = self.second(torch.tanh(h))
                return torch.cat([energy, -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]], 1)

    model = Potential().double()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    x, y = data(3, 4)
    before = {name: b.clone() for name, b in model.named_buffers()}
    H = by_differences(model, lambda: gradient(model, x, y))
    for name, b in model.named_buffers():
        b.copy_(before[name])
    op = registry.build("hessian").lower(Problem(model, MSE, (x, y)))
    assert torch.allclose(op @ torch.eye(op.shape[0]).double(), H, atol=1e-6)


class DifferentiatesByItsWeights(nn.Module):
    """As in meta-learning: an output made of a gradient with respect to a parameter."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 5).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        with torch.enable_grad():
            energy = self.inner(x).tanh().square().sum()
            (g,) = torch.autograd.grad(energy, self.inner.weight, create_graph=True)
        return self.outer(g.sum(0) + x)


def test_a_model_that_differentiates_by_its_own_weights():
    model, X, y = DifferentiatesByItsWeights(), torch.randn(3, 4).double(), torch.randint(0, 3, (3,))
    problem = Problem(model, nn.CrossEntropyLoss(), (X, y))
    assert problem.value() == pytest.approx(float(nn.CrossEntropyLoss()(model(X), y).detach()), rel=1e-12)
    params = list(model.parameters())
    gradient = torch.autograd.grad(nn.CrossEntropyLoss()(model(X), y), params, allow_unused=True)
    flat = torch.cat(
        [torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1) for g, p in zip(gradient, params)]
    )
    assert torch.allclose(problem.gradient(), flat, rtol=1e-10)


def test_a_network_of_many_kinks_is_not_taken_for_wrong():
    """Of so many activations by ReLU one changes its side in nearly every step of a size that suits smooth networks."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(6)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    data = (torch.randn(24, 3, 30, 30), torch.randint(0, 5, (24,)))
    problem = Problem(model.double(), nn.CrossEntropyLoss(), (data[0].double(), data[1]))
    v = torch.randn(problem.size).double()
    product = registry.build("hessian").lower(problem) @ v
    gradient = torch.autograd.grad(
        nn.functional.cross_entropy(model(data[0].double()), data[1]), [*model.parameters()], create_graph=True
    )
    parts = [v[place].reshape(p.shape) for place, p in zip(problem.layout.slices.values(), model.parameters())]
    expected = torch.cat([h.reshape(-1) for h in torch.autograd.grad(gradient, [*model.parameters()], parts)])
    assert (product - expected).norm() <= 1e-9 * expected.norm()


class AddedConstants(nn.Module):
    """Adds a product of constants to a parameter in one operation."""

    def __init__(self):
        super().__init__()
        self.layer, self.bias = nn.Linear(3, 2), nn.Parameter(torch.randn(2))
        self.register_buffer("left", torch.randn(2))
        self.register_buffer("right", torch.randn(2))

    def forward(self, x):
        return torch.tanh(self.layer(x)) * torch.addcmul(self.bias, self.left, self.right, value=-1)


def test_linearising_a_product_of_constants_does_not_end_the_process(inside):
    """``torch.func.linearize`` of addcmul crashes where only its first argument has a tangent."""
    inside(routes_after=1, amortised=4)
    torch.manual_seed(0)
    model = AddedConstants().double()
    X, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    problem = Problem(model, nn.MSELoss(), (X, y), factored=False)
    op, v = registry.build("ggn").lower(problem), torch.randn(problem.size).double()
    first = op @ v
    for _ in range(40):
        assert (op @ v - first).norm() <= 1e-12 * first.norm()
    assert "linearised program" in op.explain()


def _zero_rows():
    layer, X = nn.Linear(6, 8), torch.randn(20, 6)
    nn.init.zeros_(layer.bias)
    X[:5] = 0
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 3)), X


def _black_images():
    layer, X = nn.Conv2d(1, 4, 3), torch.zeros(20, 1, 10, 10)
    nn.init.zeros_(layer.bias)
    X[:, :, 4:7, 4:7] = torch.randn(20, 1, 3, 3)
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)), X


def _silent_channels():
    norm = nn.BatchNorm1d(8).eval()
    nn.init.zeros_(norm.weight)
    return nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Linear(8, 3)), torch.randn(20, 6)


@pytest.mark.parametrize("make", [_zero_rows, _black_images, _silent_channels])
def test_a_state_on_a_kink_is_not_taken_for_wrong(make):
    """Activations that are exactly zero before a ReLU: the gradient jumps there, whatever the step of a difference."""
    torch.manual_seed(0)
    model, X = make()
    model, X, y = model.double(), X.double(), torch.randint(0, 3, (20,))
    problem = Problem(model, nn.CrossEntropyLoss(), (X, y))
    v, params = torch.randn(problem.size).double(), [*model.parameters()]
    op = registry.build("hessian").lower(problem)
    gradient = torch.autograd.grad(F.cross_entropy(model(X), y), params, create_graph=True)
    parts = [v[place].reshape(p.shape) for place, p in zip(problem.layout.slices.values(), params)]
    expected = torch.cat([h.reshape(-1) for h in torch.autograd.grad(gradient, params, parts)])
    assert (op @ v - expected).norm() <= 1e-12 * expected.norm()
    assert "the state lies on a kink" in op.explain()


class DetachedBackward(torch.autograd.Function):
    """x³ with a gradient that has no derivative of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 3 * x.detach() ** 2


def test_a_kink_hides_no_wrong_formula():
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
            nn.init.zeros_(self.first.bias)

        def forward(self, x):
            return self.last(torch.relu(DetachedBackward.apply(self.first(x))))

    X = torch.randn(12, 3).double()
    X[:4] = 0
    problem = Problem(Both(), MSE, (X, torch.randn(12, 1).double()))
    with pytest.raises(ProblemError, match="second derivatives of the model are wrong"):
        registry.build("hessian").lower(problem) @ torch.randn(problem.size).double()
