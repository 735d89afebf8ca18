"""Routes are verified before they are believed: what is wrong is replaced by what is right, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from curvalg import CurvalgError, LossError, Problem, ProblemError, block_diagonal, registry

MSE = nn.MSELoss()
ROUTES = [{}, {"cache": 0}, {"columns": "loop"}, {"factored": True}]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def data(inputs=3, outputs=2, rows=5):
    return torch.randn(rows, inputs).double(), torch.randn(rows, outputs).double()


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


class Net(nn.Module):
    """first -> operation -> second."""

    def __init__(self, operation, width=4):
        super().__init__()
        self.first, self.second, self.operation = nn.Linear(3, 4).double(), nn.Linear(width, 2).double(), operation

    def forward(self, x):
        return self.second(self.operation(self.first(x)))


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


# -- parameters that are reached otherwise ----------------------------------------------------------------------------------


class ByClosure(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
        weight = self.first.weight
        self.kept = {"closure": lambda h: F.linear(h, weight), "list": [weight], "cached": weight.T}[keep]

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if callable(self.kept) and not isinstance(self.kept, torch.Tensor):
            return self.second(self.kept(h))
        return self.second(h @ (self.kept[0] if isinstance(self.kept, list) else self.kept))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("keep", ["closure", "list", "cached"])
@pytest.mark.parametrize("what", ["gradient", "hessian", "ggn", "covariance", "kfac", "jacobian"])
def test_parameters_that_an_exchange_does_not_reach_are_refused(what, keep, frozen):
    model = ByClosure(keep)
    x, y = data()
    params = "first.*"
    if frozen:  # chosen by name
        if keep == "cached":
            pytest.skip("a transpose that was made of a frozen weight is a constant of the model")
        model.requires_grad_(False)
    problem = Problem(model, MSE, (x, y), params=params)
    with pytest.raises(ProblemError, match=r"parameter 'first.weight'.*closure"):
        problem.gradient() if what == "gradient" else registry.build(what).lower(problem) @ torch.ones(12).double()
    assert all(p.requires_grad is not frozen for p in model.parameters())


@pytest.mark.parametrize("term", ["hessian", "ggn", "covariance"])
def test_checkpoints_recompute_with_the_exchanged_parameters(term):
    class Checkpointed(nn.Module):
        def __init__(self, on):
            super().__init__()
            self.a, self.b, self.c, self.on = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), on

        def forward(self, x):
            f = lambda h: torch.tanh(self.b(h))
            h = torch.tanh(self.a(x))
            return self.c(checkpoint(f, h, use_reentrant=False) if self.on else f(h))

    on, off = Checkpointed(True).double(), Checkpointed(False).double()
    off.load_state_dict(on.state_dict())
    x, y = data()
    for params in (None, "a.*", "b.*"):
        got, expected = (registry.build(term).lower(Problem(m, MSE, (x, y), params=params)) for m in (on, off))
        eye = torch.eye(got.shape[0]).double()
        assert torch.allclose(got @ eye, expected @ eye, atol=1e-12)


# -- calls that differ --------------------------------------------------------------------------------------------------------

GENERATOR, NUMPY = torch.Generator(), np.random.default_rng(0)


class Own(nn.Module):
    """Draws from a generator of its own, in an attribute."""

    def __init__(self, generator):
        super().__init__()
        self.layer, self.generator = nn.Linear(3, 2).double(), generator

    def forward(self, x):
        if isinstance(self.generator, torch.Generator):
            noise = torch.rand(len(x), 1, generator=self.generator).double()
        else:
            noise = torch.from_numpy(np.asarray(self.generator.random(size=(len(x), 1))))
        return self.layer(x) * noise


RANDOM = {
    "global torch generator": lambda: Net(lambda h: h * torch.rand(h.shape, generator=GENERATOR)),
    "global NumPy generator": lambda: Net(lambda h: h * torch.from_numpy(NUMPY.random(h.shape))),
    "own torch generator": lambda: Own(torch.Generator()),
    "own NumPy generator": lambda: Own(np.random.default_rng(1)),
    "own RandomState": lambda: Own(np.random.RandomState(1)),
}


@pytest.mark.parametrize("term", ["hessian", "ggn", "covariance", "jacobian"])
@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_of_a_models_own_are_refused(name, term):
    x, y = data()
    problem = Problem(RANDOM[name](), MSE, (x, y), cache=0)
    with pytest.raises(ProblemError, match="random"):
        registry.build(term).lower(problem) @ torch.ones(problem.size).double()
    with pytest.raises(ProblemError, match="random"):
        problem.gradient()


@pytest.mark.parametrize("name", ["own torch generator", "own NumPy generator", "own RandomState"])
def test_own_generators_are_replayed_where_draws_are_frozen(name):
    from curvalg.problem.model.watch import read_generator

    model = RANDOM[name]()
    before = read_generator(model.generator)
    x, y = data()
    op = registry.build("ggn").lower(Problem(model, MSE, (x, y), cache=0, randomness="frozen"))
    v = torch.ones(8).double()
    assert torch.equal(op @ v, op @ v)
    assert read_generator(model.generator) == before


class Running(nn.Module):
    """A mean over calls, in a tensor that is no buffer; ``inside`` a list."""

    def __init__(self, inside):
        super().__init__()
        self.layer, self.inside = nn.Linear(3, 2).double(), inside
        self.mean = [torch.zeros(3).double()] if inside else torch.zeros(3).double()

    def forward(self, x):
        mean = self.mean[0] if self.inside else self.mean
        mean.mul_(0.9).add_(0.1 * x.mean(0))
        return torch.tanh(self.layer(x * (1 + mean)))


@pytest.mark.parametrize("term", ["hessian", "ggn", "covariance"])
@pytest.mark.parametrize("options", [{}, {"cache": 0}], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_a_state_that_calls_change_in_place_is_put_back(inside, options, term):
    model = Running(inside)
    x, y = data()

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model.layer

        def forward(self, x):
            return torch.tanh(self.layer(x * (1 + 0.1 * x.mean(0))))

    op, expected = (registry.build(term).lower(Problem(m, MSE, (x, y), **options)) for m in (model, Fixed()))
    v = torch.randn(8).double()
    for _ in range(2):
        assert torch.allclose(op @ v, expected @ v, atol=1e-12)
    assert not (model.mean[0] if inside else model.mean).any()


def test_a_state_in_plain_numbers_that_changes_the_output_is_refused():
    class Drifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.count = nn.Linear(3, 2).double(), [0]

        def forward(self, x):
            self.count[0] += 1
            return self.layer(x) * self.count[0]

    x, y = data()
    for term in ("ggn", "hessian", "covariance", "jacobian"):
        with pytest.raises(ProblemError, match="not the same in every call"):
            registry.build(term).lower(Problem(Drifts(), MSE, (x, y))) @ torch.ones(8).double()


# -- losses that depend on more than the output -------------------------------------------------------------------------------


def test_a_penalty_inside_the_loss_is_refused_by_name():
    model = nn.Linear(3, 2).double()
    x, y = data()
    penalty = lambda o, t: MSE(o, t) + 0.1 * sum(p.square().sum() for p in model.parameters())
    problem = Problem(model, penalty, (x, y), reduction="mean")
    for ask in (
        problem.value,
        problem.gradient,
        lambda: registry.build("hessian").lower(problem) @ torch.ones(8).double(),
    ):
        with pytest.raises(LossError, match=r"parameters.*penalty.*Identity"):
            ask()


# -- cost -------------------------------------------------------------------------------------------------------------------------


def test_nothing_is_verified_twice(counted_model):
    """Further products cost no model call, and another state one tangent check at most."""
    problem, calls = counted_model("mlp", columns="loop")
    op = registry.build("hessian").lower(problem)
    v = torch.ones(problem.size).double()
    op @ v
    before = calls()
    op @ v
    assert calls() == before
    with torch.no_grad():
        next(problem.model.module.parameters()).mul_(1.1)
    op.refresh() @ v
    assert calls() - before <= len(problem.data.source)


def test_everything_is_a_curvalg_error():
    """Nothing of the checks themselves leaks out of a model that fails on its own."""
    x, y = data()
    with pytest.raises((CurvalgError, ZeroDivisionError)):
        registry.build("ggn").lower(Problem(Net(lambda h: h * (1 / 0)), MSE, (x, y))) @ torch.ones(26).double()


class Strange(nn.Module):
    """A hook that is right for every column alone, and wrong for several in one pass once ``wrong`` is set."""

    def __init__(self):
        super().__init__()
        self.layer, self.wrong = nn.Linear(3, 2).double(), False

    def forward(self, x):
        z = self.layer(x).tanh()
        if z.requires_grad:
            wrong = self.wrong
            z.register_hook(lambda g: 2 * g if wrong and is_legacy_batchedtensor(g) else g)
        return z


def test_columns_are_compared_at_every_state(monkeypatch):
    """What was chosen at one state is remembered, and may be wrong at another."""
    monkeypatch.setattr("curvalg.lowering.sweeps.linearization.fastest", lambda run: (run(), 1.0)[1])  # wide is cheap
    model = Strange()
    X, Y, V = torch.randn(6, 3).double(), torch.randn(6, 2).double(), torch.randn(8, 5).double()
    problem = Problem(model, nn.MSELoss(), (X, Y))
    op = registry.build("hessian").lower(problem)
    assert torch.allclose(op @ V, torch.stack([op @ v for v in V.unbind(1)], 1), rtol=1e-10)
    assert "4 at a time" in op.explain()
    model.wrong = True
    op.refresh()
    assert torch.allclose(op @ V, torch.stack([op @ v for v in V.unbind(1)], 1), rtol=1e-10)
    assert "a batched product differs from a single one" in op.explain()


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


class Experts(nn.Module):
    """Rows with a positive first entry go through a function without a second derivative, or without a forward derivative."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(3, 2).double(), nn.Linear(3, 2).double(), function

    def forward(self, x):
        chosen = x[:, 0] > 0
        z = torch.zeros(len(x), 2).double()
        if (~chosen).any():
            z = z.index_put(((~chosen).nonzero()[:, 0],), self.first(x[~chosen]).tanh())
        if chosen.any():
            z = z.index_put((chosen.nonzero()[:, 0],), self.function(self.second(x[chosen])))
        return z


class Once(torch.autograd.Function):
    """Neither a second derivative nor forward AD."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


@pytest.mark.parametrize("options", [{}, {"cache": 0}, {"columns": "loop"}], ids=str)
@pytest.mark.parametrize("function", [F.hardsigmoid, Once.apply], ids=["hardsigmoid", "once"])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_route_that_fails_on_a_later_batch_is_replaced(function, blocks, options):
    X, y = torch.randn(6, 3).double(), torch.randint(0, 2, (6,))
    X[:3, 0], X[3:, 0] = -1.0, 1.0
    model = Experts(function)
    problem = Problem(model, nn.CrossEntropyLoss(), [(X[:3], y[:3]), (X[3:], y[3:])], **options)
    z = model(X)
    J = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(e, list(model.parameters()), retain_graph=True)])
            for e in z.reshape(-1)
        ]
    )
    p = z.detach().softmax(1)
    B = torch.block_diag(*[(row.diag() - torch.outer(row, row)) / 6 for row in p])
    expected, expr = J.T @ B @ J, registry.build("ggn")
    if blocks:
        expr = block_diagonal(expr)
        expected = torch.block_diag(*[expected[s, s] for s in problem.layout.slices.values()])
    op, V = expr.lower(problem), torch.randn(problem.size, 3).double()
    for _ in range(2):
        assert torch.allclose(op @ V[:, 0], expected @ V[:, 0], rtol=1e-9)
        assert torch.allclose(op @ V, expected @ V, rtol=1e-9)


class Wrong(torch.autograd.Function):
    """x, with a derivative of 3."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class Squared(torch.autograd.Function):
    """x², with a wrong second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * Wrong.apply(ctx.saved_tensors[0]) * g


def test_a_check_that_failed_fails_again():
    """What was refused once must not be believed the second time."""

    class Net(nn.Linear):
        def forward(self, x):
            return Squared.apply(super().forward(x))

    problem = Problem(Net(3, 2).double(), nn.MSELoss(), (torch.randn(4, 3).double(), torch.randn(4, 2).double()))
    op = registry.build("hessian").lower(problem)
    for _ in range(3):
        with pytest.raises(ProblemError, match="second derivatives"):
            op @ torch.ones(8).double()


class WrongForward(torch.autograd.Function):
    """x³, whose tangents are doubled."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g

    @staticmethod
    def jvp(ctx, t):
        return 6 * ctx.saved_tensors[0] ** 2 * t


@pytest.mark.parametrize("options", [{}, {"cache": 0}], ids=str)
def test_operations_of_a_later_batch_are_verified_there(options):
    X, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    X[:3, 0], X[3:, 0] = -1.0, 1.0
    data, v = [(X[:3], y[:3]), (X[3:], y[3:])], torch.randn(16).double()
    right, wrong = Experts(lambda x: x**3), Experts(WrongForward.apply)
    wrong.load_state_dict(right.state_dict())
    for columns in (v, torch.stack([v, 2 * v], 1)):
        expected, got = (
            registry.build("ggn").lower(Problem(m, nn.MSELoss(), data, **options)) @ columns for m in (right, wrong)
        )
        assert torch.allclose(got, expected, rtol=1e-10)
    op = registry.build("hessian").lower(Problem(Experts(Squared.apply), nn.MSELoss(), data, **options))
    for _ in range(2):
        with pytest.raises(ProblemError, match="second derivatives"):
            op @ v
