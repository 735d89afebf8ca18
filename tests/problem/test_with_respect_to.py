"""Derivatives by inputs and by activations: ordinary problems over an additive perturbation, right against torch.func."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.utils.data import DataLoader, TensorDataset

from curvalg import Identity, OptionError, Problem, ProblemError, inverse, registry
from curvalg.estimate import eigsh

N, D, C = 5, 3, 2


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Network(nn.Module):
    """Two layers and a head, of which the second may be reached from outside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.head = nn.Linear(D, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, C)
        self.norm = nn.BatchNorm1d(4)
        self.double().eval()

    def forward(self, x):
        return self.head(self.middle(self.norm(self.first(x).tanh())).square())

    def tail(self, h):
        return self.head(h.square())

    def inner(self, x):
        return self.middle(self.norm(self.first(x).tanh()))


MODEL = Network()
X, LABELS, Y = random(N, D), torch.arange(N) % C, random(N, C, seed=1)
LOSSES = {"cross-entropy": (nn.CrossEntropyLoss(), LABELS), "mse": (nn.MSELoss(), Y)}
CASES = {
    "inputs": ("inputs", lambda model: X, lambda model: model, "input"),
    "activations": (
        "activations:middle",
        lambda model: model.inner(X).detach(),
        lambda model: model.tail,
        "activation",
    ),
    "a first layer": (
        "activations:first",
        lambda model: model.first(X).detach(),
        lambda model: lambda h: model.tail(model.middle(model.norm(h.tanh()))),
        "activation",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", LOSSES)
def test_all_terms_against_torch(name, kind):
    wrt, at, tail, label = CASES[name]
    loss, y = LOSSES[kind]
    h, f = at(MODEL), tail(MODEL)
    problem = Problem(MODEL, loss, (X, y), wrt=wrt)
    size = h.numel()
    assert problem.layout.names == [label] and problem.layout.shapes[label] == h.shape
    assert problem.value() == pytest.approx(loss(f(h), y).item())
    H = hessian(lambda h: loss(f(h), y))(h).reshape(size, size)
    torch.testing.assert_close(registry.build("hessian").lower(problem).to_dense(), H)
    J = jacrev(f)(h).reshape(N * C, size)
    torch.testing.assert_close(registry.build("jacobian").lower(problem).to_dense(), J)
    z = f(h).detach()
    B = hessian(lambda z: loss(z, y))(z).reshape(N * C, N * C)
    ggn = registry.build("ggn")
    torch.testing.assert_close(ggn.lower(problem).to_dense(), J.T @ B @ J)
    each = jacrev(
        lambda h: (
            nn.functional.cross_entropy(f(h), y, reduction="none")
            if kind == "cross-entropy"
            else (f(h) - y).square().mean(1)
        )
    )(h)
    G = each.reshape(N, size)
    torch.testing.assert_close(registry.build("covariance").lower(problem).to_dense(), G.T @ G / N)
    torch.testing.assert_close(problem.gradient(), G.mean(0))
    torch.testing.assert_close(problem.per_sample_gradients(), G)
    v = random(size, 3, seed=3)
    torch.testing.assert_close(registry.build("hessian").lower(problem) @ v, H @ v)
    pairs = eigsh(registry.build("hessian").lower(problem), k=2, which="LA", tol=1e-8)
    torch.testing.assert_close(torch.as_tensor(pairs.eigenvalues), torch.linalg.eigvalsh(H)[-2:], atol=1e-7, rtol=1e-6)
    op = (ggn + 0.1 * Identity).lower(problem)
    dense = J.T @ B @ J + 0.1 * torch.eye(size, dtype=torch.float64)
    assert op.exact("logdet") == pytest.approx(torch.logdet(dense).item())
    torch.testing.assert_close(inverse(ggn + 0.1 * Identity).lower(problem) @ v, torch.linalg.solve(dense, v))


class Counting(Network):
    """Counts its calls in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.calls = torch.zeros(1)

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_the_users_model_is_left_as_it_is():
    model = Counting().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    hooks = [len(child._forward_hooks) for child in model.modules()]
    for wrt in ("inputs", "activations:middle"):
        problem = Problem(model, nn.MSELoss(), (X, Y), wrt=wrt)
        _ = registry.build("hessian").lower(problem) @ random(problem.size)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [len(child._forward_hooks) for child in model.modules()] == hooks
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training and model.calls.item() == 0


def test_data_and_parameters_are_watched():
    model, inputs = Network(), X.clone()
    problem = Problem(model, nn.MSELoss(), (inputs, Y), wrt="inputs")
    first = problem.value()
    inputs.add_(1)
    assert problem.value() == pytest.approx(nn.MSELoss()(model(inputs), Y).item()) != first
    with torch.no_grad():
        model.head.bias.add_(1)
    assert problem.value() == pytest.approx(nn.MSELoss()(model(inputs), Y).item())


def test_a_step_moves_the_perturbation_alone():
    inputs = X.clone()
    problem = Problem(MODEL, nn.MSELoss(), (inputs, Y), wrt="inputs")
    g = problem.gradient()
    problem.step(g, 0.1)
    assert torch.equal(inputs, X)
    moved = X - 0.1 * g.reshape(X.shape)
    assert problem.value() == pytest.approx(nn.MSELoss()(MODEL(moved), Y).item())


@pytest.mark.parametrize("wrt", ["inputs", "activations:middle"])
def test_rows_get_what_is_added_to_them(wrt):
    problem = Problem(MODEL, nn.MSELoss(), (X, Y), wrt=wrt)
    perturbed = problem.step(random(problem.size), 1.0).model.module
    rows = torch.tensor([3, 1])
    whole, part = perturbed(torch.arange(N), (X, Y)), perturbed(rows, (X[rows], Y[rows]))
    torch.testing.assert_close(part, whole[rows])
    assert not torch.allclose(whole, MODEL(X))


class Two(nn.Module):
    """Two floating inputs and a mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(D, C).double()

    def forward(self, a, b, keep):
        return self.layer(a * keep[:, None]).tanh() + b.square()


def test_several_inputs_and_mappings():
    model, keep, b = Two(), torch.arange(N) > 0, random(N, C, seed=7)
    batch = {"a": X, "b": b, "keep": keep, "labels": Y}
    problem = Problem(model, nn.MSELoss(), batch, wrt="inputs")
    assert problem.layout.names == ["input_0", "input_1"]
    H = hessian(lambda v: nn.functional.mse_loss(model(v[: N * D].reshape(N, D), v[N * D :].reshape(N, C), keep), Y))
    at = torch.cat([X.reshape(-1), b.reshape(-1)])
    torch.testing.assert_close(registry.build("hessian").lower(problem).to_dense(), H(at))
    forward = Problem(
        model, nn.MSELoss(), [((X, b, keep), Y)], wrt="inputs", forward=lambda model, batch: model(*batch[0])
    )
    torch.testing.assert_close(registry.build("hessian").lower(forward).to_dense(), H(at))


def test_tokens_by_their_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, C)).double()
    tokens = torch.randint(0, 7, (N, 3))
    with pytest.raises(ProblemError, match="activations of the module that embeds"):
        Problem(model, nn.CrossEntropyLoss(), (tokens, LABELS), wrt="inputs")
    problem = Problem(model, nn.CrossEntropyLoss(), (tokens, LABELS), wrt="activations:0")
    h = model[0](tokens).detach()
    H = hessian(lambda h: nn.functional.cross_entropy(model[2](h.flatten(1)), LABELS))(h).reshape(60, 60)
    torch.testing.assert_close(registry.build("hessian").lower(problem).to_dense(), H)


def test_one_batch_of_any_form():
    loader = DataLoader(TensorDataset(X, Y), batch_size=N)
    expected = Problem(MODEL, nn.MSELoss(), (X, Y), wrt="inputs").gradient()
    torch.testing.assert_close(Problem(MODEL, nn.MSELoss(), loader, wrt="inputs").gradient(), expected)
    alone = Problem(MODEL, lambda z: z.square().sum(), X, wrt="inputs", reduction="sum")
    torch.testing.assert_close(alone.gradient(), jacrev(lambda x: MODEL(x).square().sum())(X).reshape(-1))
    outputs = Problem(MODEL, None, X, wrt="inputs")
    torch.testing.assert_close(
        registry.build("jacobian").lower(outputs).to_dense(), jacrev(MODEL)(X).reshape(N * C, N * D)
    )
    copied = pickle.loads(pickle.dumps(Problem(MODEL, nn.MSELoss(), (X, Y), wrt="inputs")))
    torch.testing.assert_close(copied.gradient(), expected)


def test_a_function_does_it_by_its_parameters():
    """What the message says."""
    state = dict(MODEL.named_parameters()) | dict(MODEL.named_buffers())

    def model(params, index):
        return functional_call(MODEL, state, (params["input"][index],))

    with pytest.raises(ProblemError, match=r"needs an nn.Module; a function takes"):
        Problem(model, nn.MSELoss(), (X, Y), wrt="inputs")
    by_hand = Problem(model, nn.MSELoss(), (torch.arange(N), Y), params={"input": X.clone()})
    expected = Problem(MODEL, nn.MSELoss(), (X, Y), wrt="inputs")
    torch.testing.assert_close(by_hand.gradient(), expected.gradient())


class Twice(nn.Module):
    """A module that is called twice, one that is never, and one that gives a pair."""

    def __init__(self):
        super().__init__()
        self.layer, self.idle, self.cell = nn.Linear(D, D).double(), nn.Linear(2, 2).double(), nn.GRU(D, D).double()

    def forward(self, x):
        return self.layer(self.layer(x)) + self.cell(x[None])[0][0]


WRONG = {
    "an unknown word": ("outputs", MODEL, {}, OptionError, "'inputs', or 'activations:'"),
    "no name": ("activations:", MODEL, {}, ProblemError, "the modules are first, middle"),
    "an unknown module": ("activations:midle", MODEL, {}, ProblemError, "did you mean middle"),
    "parameters": ("inputs", MODEL, {"params": "head.*"}, OptionError, "leave params="),
    "twice": ("activations:layer", Twice(), {}, ProblemError, "called 2 times"),
    "never": ("activations:idle", Twice(), {}, ProblemError, "called 0 times"),
    "a pair": ("activations:cell", Twice(), {}, ProblemError, "gives a .*tensor of floating point"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_questions(name):
    wrt, model, options, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        Problem(model, nn.MSELoss(), (X, Y), wrt=wrt, **options)


def test_several_batches_and_other_data_are_refused():
    with pytest.raises(ProblemError, match=r"one batch.*pass one of them"):
        Problem(MODEL, nn.MSELoss(), [(X[:2], Y[:2]), (X[2:], Y[2:])], wrt="inputs")
    problem = Problem(MODEL, nn.MSELoss(), (X, Y), wrt="activations:middle")
    with pytest.raises(ProblemError, match="make another"):
        problem.with_data((X, Y)).gradient()
    with pytest.raises(ProblemError, match="inputs alone"):
        Problem(MODEL, nn.MSELoss(), X, wrt="inputs")


def test_a_module_that_has_two_names_is_found_under_both():
    torch.manual_seed(0)
    first = nn.Linear(D, 4)
    model = nn.ModuleDict({"a": first, "b": first, "head": nn.Linear(4, C)}).double()
    y = random(N, C, seed=2)
    found = [
        Problem(
            model,
            nn.MSELoss(),
            (X, y),
            wrt=f"activations:{name}",
            forward=lambda m, batch: m["head"](m["b"](batch[0]).tanh()),
        ).gradient()
        for name in ("a", "b")
    ]
    h = first(X).detach().requires_grad_()
    nn.functional.mse_loss(model["head"](h.tanh()), y).backward()
    for gradient in found:
        torch.testing.assert_close(gradient, h.grad.reshape(-1))


def test_what_the_model_does_not_read_of_a_batch_is_no_input():
    record = {"label": Y, "pixels": X, "scale": torch.tensor(2.0, dtype=torch.float64)}
    with torch.no_grad():
        problem = Problem(
            MODEL,
            nn.MSELoss(),
            record,
            wrt="inputs",
            forward=lambda model, batch: model(batch["pixels"]),
            target=lambda batch: batch["label"],
        )
    expected = Problem(MODEL, nn.MSELoss(), (X, Y), wrt="inputs")
    assert problem.layout.names == ["input"]
    torch.testing.assert_close(
        registry.build("hessian").lower(problem).to_dense(), registry.build("hessian").lower(expected).to_dense()
    )


def test_the_call_that_finds_what_is_read_leaves_nothing_behind():
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(D), "last": nn.Linear(D, C)}).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    problem = Problem(
        model,
        nn.MSELoss(),
        [(X, X.square(), Y)],
        wrt="inputs",
        forward=lambda m, batch: m["last"](m["norm"](batch[0]).add_(batch[1])),
        target=lambda batch: batch[2],
    )
    assert problem.layout.names == ["input_0", "input_1"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_module_that_torch_jit_compiled_is_refused():
    scripted = torch.jit.trace(nn.Sequential(nn.Linear(D, 4), nn.Linear(4, C)).double(), X)
    with pytest.raises(ProblemError, match=r"torch\.jit"):
        Problem(scripted, nn.MSELoss(), (X, Y), wrt="activations:0")
