"""A network that is written in another way has the same Kronecker factors, in the places of its own parameters."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg import CurvalgWarning, Identity, Problem, ProblemError, block_diagonal, inverse, registry
from curvalg.losses import CrossEntropy

build = registry.build
NAMES = ["kfac", "ekfac", "foof"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """Layers, and a function of them."""

    def __init__(self, function, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, nn.Parameter(layer) if isinstance(layer, torch.Tensor) else layer)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def head(function):
    return lambda m, x: m.head(function(m, x).tanh())


def stacked(weights):
    return torch.cat(weights), None


def conv1d_of_gpt2():
    """The weight of a Conv1D lies inputs first."""
    plain = Net(head(lambda m, x: m.a(x)), a=nn.Linear(3, 4), head=nn.Linear(4, 2))
    other = Net(
        head(lambda m, x: torch.addmm(m.b, x.view(-1, 3), m.w).view(x.shape[0], -1)),
        w=torch.zeros(3, 4),
        b=torch.zeros(4),
        head=nn.Linear(4, 2),
    )
    return plain, other, {"w": lambda p: p["a.weight"].T, "b": lambda p: p["a.bias"]}, random(7, 3)


def bias_first():
    plain = Net(head(lambda m, x: m.a(x)), a=nn.Linear(3, 4), head=nn.Linear(4, 2))
    other = Net(head(lambda m, x: x @ m.w.T + m.b), b=torch.zeros(4), w=torch.zeros(4, 3), head=nn.Linear(4, 2))
    return plain, other, {"w": lambda p: p["a.weight"], "b": lambda p: p["a.bias"]}, random(7, 3)


def groups():
    plain = Net(
        head(lambda m, x: torch.cat([m.a(x[:, :3]), m.b(x[:, 3:])], 1)),
        a=nn.Linear(3, 2),
        b=nn.Linear(3, 2),
        head=nn.Linear(4, 2),
    )
    other = Net(head(lambda m, x: m.c(x[..., None])[..., 0]), c=nn.Conv1d(6, 4, 1, groups=2), head=nn.Linear(4, 2))
    return (
        plain,
        other,
        {
            "c.weight": lambda p: torch.cat([p["a.weight"], p["b.weight"]])[..., None],
            "c.bias": lambda p: torch.cat([p["a.bias"], p["b.bias"]]),
        },
        random(7, 6),
    )


def transposed(groups=1):
    """A transposed convolution with stride one is a convolution with the flipped kernel."""

    def weight(p):
        w = p["a.weight"].flip(2)  # (out, in / groups, k)
        return w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)

    plain = Net(
        head(lambda m, x: m.a(x).flatten(1)), a=nn.Conv1d(4, 6, 3, padding=1, groups=groups), head=nn.Linear(30, 2)
    )
    other = Net(
        head(lambda m, x: m.c(x).flatten(1)),
        c=nn.ConvTranspose1d(4, 6, 3, padding=1, groups=groups),
        head=nn.Linear(30, 2),
    )
    return plain, other, {"c.weight": weight, "c.bias": lambda p: p["a.bias"]}, random(20, 4, 5)


def attend(q, k, v, heads=2):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def self_attention():
    plain = Net(
        head(lambda m, x: m.out(attend(*m.into(x).chunk(3, -1))).flatten(1)),
        into=nn.Linear(4, 12),
        out=nn.Linear(4, 4),
        head=nn.Linear(12, 2),
    )
    other = Net(
        head(lambda m, x: m.attend(x, x, x)[0].flatten(1)),
        attend=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(12, 2),
    )
    return (
        plain,
        other,
        {
            "attend.in_proj_weight": lambda p: p["into.weight"],
            "attend.in_proj_bias": lambda p: p["into.bias"],
            "attend.out_proj.weight": lambda p: p["out.weight"],
            "attend.out_proj.bias": lambda p: p["out.bias"],
        },
        random(5, 3, 4),
    )


def cross_attention():
    plain = Net(
        head(lambda m, x: m.out(attend(m.q(x), m.k(x * x), m.v(x.cos()))).flatten(1)),
        q=nn.Linear(4, 4),
        k=nn.Linear(4, 4),
        v=nn.Linear(4, 4),
        out=nn.Linear(4, 4),
        head=nn.Linear(12, 2),
    )
    other = Net(
        head(lambda m, x: m.attend(x, x * x, x.cos())[0].flatten(1)),
        attend=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(12, 2),
    )
    return (
        plain,
        other,
        {
            "attend.in_proj_weight": lambda p: torch.cat([p[f"{k}.weight"] for k in "qkv"]),
            "attend.in_proj_bias": lambda p: torch.cat([p[f"{k}.bias"] for k in "qkv"]),
            "attend.out_proj.weight": lambda p: p["out.weight"],
            "attend.out_proj.bias": lambda p: p["out.bias"],
        },
        random(5, 3, 4),
    )


def lstm():
    def steps(m, x):
        h = c = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            i, f, g, o = (m.a(step) + m.b(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h

    plain = Net(head(steps), a=nn.Linear(2, 12), b=nn.Linear(3, 12), head=nn.Linear(3, 2))
    other = Net(head(lambda m, x: m.rnn(x)[0][:, -1]), rnn=nn.LSTM(2, 3, batch_first=True), head=nn.Linear(3, 2))
    return (
        plain,
        other,
        {
            "rnn.weight_ih_l0": lambda p: p["a.weight"],
            "rnn.weight_hh_l0": lambda p: p["b.weight"],
            "rnn.bias_ih_l0": lambda p: p["a.bias"],
            "rnn.bias_hh_l0": lambda p: p["b.bias"],
        },
        random(6, 4, 2),
    )


def experts(skip=False):
    """Rows are sent to experts; their weights are one tensor. An expert without rows has no curvature."""

    def routed(weights, x):
        parts = x.new_zeros(len(x), 2)
        for e in range(3):
            chosen = (x[:, 0] > 0).long() == e
            if skip and not chosen.any():
                continue
            parts = parts.index_put((chosen.nonzero()[:, 0],), F.linear(x[chosen], weights[e]))
        return parts

    layers = {k: nn.Linear(3, 2, bias=False) for k in "abc"}
    plain = Net(head(lambda m, x: routed([m.a.weight, m.b.weight, m.c.weight], x)), **layers, head=nn.Linear(2, 2))
    other = Net(head(lambda m, x: routed(m.w, x)), w=torch.zeros(3, 2, 3), head=nn.Linear(2, 2))
    return plain, other, {"w": lambda p: torch.stack([p[f"{k}.weight"] for k in "abc"])}, random(8, 3)


def heads():
    plain = Net(
        head(lambda m, x: torch.cat([m.a(x[:, 0]), m.b(x[:, 1])], 1)),
        a=nn.Linear(3, 2, bias=False),
        b=nn.Linear(3, 2, bias=False),
        head=nn.Linear(4, 2),
    )
    other = Net(
        head(lambda m, x: torch.einsum("nhd,hdo->nho", x, m.w).flatten(1)), w=torch.zeros(2, 3, 2), head=nn.Linear(4, 2)
    )
    return plain, other, {"w": lambda p: torch.stack([p["a.weight"].T, p["b.weight"].T])}, random(7, 2, 3)


CASES = {
    "Conv1D": conv1d_of_gpt2,
    "bias before its weight": bias_first,
    "groups": groups,
    "transposed convolution": transposed,
    "transposed convolution with groups": lambda: transposed(2),
    "self attention": self_attention,
    "cross attention": cross_attention,
    "LSTM": lstm,
    "experts": experts,
    "experts that are skipped without rows": lambda: experts(skip=True),
    "heads by einsum": heads,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"joint": False}, {"approximation": "reduce"}], ids=str)
def test_the_matrix_is_that_of_linear_layers(case, name, options):
    torch.manual_seed(0)
    plain, other, write, X = CASES[case]()
    plain, other = plain.double(), other.double()
    write |= {k: (lambda p, k=k: p[k]) for k in ("head.weight", "head.bias")}

    def written(p):
        return {k: write[k](p) for k, _ in other.named_parameters()}

    with torch.no_grad():
        for k, value in written(dict(plain.named_parameters())).items():
            other.get_parameter(k).copy_(value)
    data = [(X[:4], random(4, 2, seed=1)), (X[4:], random(len(X) - 4, 2, seed=2))]
    problems = [Problem(net, nn.MSELoss(), data) for net in (plain, other)]
    v = problems[0].layout.unflatten(random(problems[0].size, seed=3))
    if name == "foof":  # no factor of an expert without rows is known, but the identity would be
        options = options | {"rest": "exact"}
    expr = build(name, **options)
    if case == "bias before its weight" and options.get("joint", True):
        assert other.b is not None  # an added parameter is a layer of its own
        expr = build(name, **options | {"joint": False})
    for form in (expr, inverse(expr + 0.1 * Identity)):
        expected = written(form.lower(problems[0]) @ v)
        op = form.lower(problems[1])
        got = op @ written(v)
        size = sum(float(e.square().sum()) for e in expected.values()) ** 0.5
        error = sum(float((got[k] - e).square().sum()) for k, e in expected.items()) ** 0.5
        assert error <= 1e-9 * size
    assert "dense: chosen" not in op.explain()


def tokens(net, classes=5, rows=4, length=3):
    g = torch.Generator().manual_seed(0)
    X, y = (torch.randint(0, classes, (rows, length), generator=g) for _ in range(2))
    return Problem(net.double(), CrossEntropy(class_axis=-1), (X, y))


def language_model(tied=False, width=4, norm=True):
    torch.manual_seed(0)
    layers = {"table": nn.Embedding(5, width), "norm": nn.LayerNorm(width), "places": nn.Embedding(6, width)}
    if not tied:
        layers["out"] = nn.Linear(width, 5, bias=False)
    return Net(
        lambda m, x: F.linear(
            m.norm(m.table(x) + m.places(torch.arange(x.shape[1]))[None]).tanh(),
            m.table.weight if tied else m.out.weight,
        ),
        **layers,
    )


def test_norms_get_their_exact_block():
    problem = tokens(language_model())
    exact = block_diagonal(build("ggn"), by="module").lower(problem).to_dense()
    at = torch.cat([torch.arange(problem.size)[problem.layout.slices[f"norm.{k}"]] for k in ("weight", "bias")])
    for name in ("kfac", "ekfac"):
        got = build(name).lower(problem).to_dense()[at][:, at]
        assert (got - exact[at][:, at]).norm() <= 1e-10 * exact[at][:, at].norm()
        apart = build(name, joint=False).lower(problem).to_dense()[at][:, at]
        assert float(apart[:4, 4:].abs().max()) == 0


def test_a_small_table_that_is_the_head_as_well_gets_its_exact_block():
    problem = tokens(language_model(tied=True))
    at = problem.layout.slices["table.weight"]
    exact = build("ggn").lower(problem).to_dense()[at, at]
    got = build("kfac").lower(problem).to_dense()[at, at]
    assert (got - exact).norm() <= 1e-10 * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused_is_named_with_its_reason_before_many_columns_are_pulled_back(name, monkeypatch):
    problem = tokens(language_model(tied=True, width=300), length=6, rows=10)
    op = build(name).lower(problem)
    backward, columns = torch.autograd.grad, []

    def counted(outputs, inputs, grad_outputs=None, **options):
        if options.get("is_grads_batched"):
            columns.append(len(grad_outputs[0]))
        return backward(outputs, inputs, grad_outputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    with pytest.raises(
        ProblemError, match=r"table\.weight \(5, 300\), because .*in several ways.*dense, embedding.*rest="
    ) as e:
        op.prepare()
    assert "places" not in str(e.value) and "norm" not in str(e.value)
    assert not columns  # of which there are 6 positions times 4


def test_a_diagonal_for_most_of_the_parameters_is_said():
    problem = tokens(language_model(tied=True, width=300))
    with pytest.warns(
        CurvalgWarning, match=r"kfac: [0-9]+% of the parameters have no Kronecker factors.*table\.weight"
    ):
        build("kfac", rest="diagonal").lower(problem).prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("kfac", rest="diagonal").lower(tokens(language_model())).prepare()


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_a_bias_alone_has_the_block_that_it_has_beside_its_weight(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = (random(6, 3), random(6, 2, seed=1))
    whole = Problem(net, nn.MSELoss(), data)
    alone = Problem(net, nn.MSELoss(), data, params=["0.bias"])
    at = whole.layout.slices["0.bias"]
    expected = build(name, joint=False).lower(whole).to_dense()[at, at]
    got = build(name).lower(alone).to_dense()
    assert (got - expected).norm() <= 1e-12 * expected.norm()


def test_a_bias_in_a_block_of_its_own_is_damped_exactly():
    torch.manual_seed(0)
    problem = Problem(nn.Linear(3, 4).double(), nn.MSELoss(), (random(6, 3), random(6, 4, seed=1)))
    at, c = problem.layout.slices["bias"], 0.3
    plain = build("kfac", joint=False).lower(problem).to_dense()[at, at]
    damped = build("kfac", joint=False, factored_damping=c).lower(problem).to_dense()[at, at]
    assert torch.allclose(damped, plain + c * torch.eye(4), atol=1e-14)


def flattened(sequences, **options):
    """One language model: with an output of sequences, and with one whose rows are the tokens of all sequences."""
    net = language_model().double()
    g = torch.Generator().manual_seed(0)
    data = [tuple(torch.randint(0, 5, (n, 3), generator=g) for _ in range(2)) for n in (4, 2)]
    for _, y in data:
        y[0, 1] = -100

    def mixing(model, batch):
        model.places.weight
        h = model.norm(model.table(batch[0]) + model.places(torch.arange(3))[None]).cumsum(1).tanh()
        return model.out(h)

    if sequences:
        return Problem(net, CrossEntropy(class_axis=-1), data, forward=mixing, **options)
    return Problem(
        net,
        nn.CrossEntropyLoss(),
        data,
        forward=lambda model, batch: mixing(model, batch).flatten(0, 1),
        target=lambda batch: batch[1].flatten(),
        **options,
    )


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_tokens_that_are_rows_have_the_factors_of_positions(name, fisher):
    rows, positions = flattened(False), flattened(True, samples="position")
    got = build(name, fisher=fisher).lower(rows).to_dense()
    expected = build(name, fisher=fisher).lower(positions).to_dense()
    assert (got - expected).norm() <= 1e-9 * expected.norm()


def test_draws_of_tokens_that_are_rows_take_one_column_each():
    problem = flattened(False)
    exact = build("kfac").lower(problem).to_dense()
    got = build("kfac", fisher="mc", samples=400).lower(problem).to_dense()
    assert (got - exact).norm() <= 0.15 * exact.norm()
    with problem.batches() as batches:
        batch = next(iter(batches))
        s = batch.pseudo_gradients(2)
        assert {(r.columns, r.rows) for r in batch.layers(s, independent=True)} == {(2, 4)}
        assert {(r.columns, r.rows) for r in batch.layers(s)} == {(2, 12)}
