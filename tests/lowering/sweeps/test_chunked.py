"""Products through outputs in chunks are those through the whole outputs, and these are never made."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvalg import Problem, StaleError, registry
from curvalg.losses import CrossEntropy, KLDivWithLogits
from curvalg.problem.large_outputs import HeadNotes
from curvalg.problem.verification import TangentNotes
from tests.support.large_outputs import (
    LAST,
    POSITIONWISE,
    PROBABILITIES,
    SUM,
    B,
    D,
    Language,
    V,
    agree,
    build,
    chunked,
    compare,
    data,
    memory,
    pair,
    vectors,
)

SAMPLEWISE = {
    "ggn_mc": registry.build("ggn_mc", samples=3, seed=1),
    "fisher_mc": registry.build("fisher_mc", samples=2),
    "covariance": build("covariance"),
    "sum": build("covariance") - 2 * build("hessian") + build("ggn_mc"),
}
LAYOUTS = {
    "(B, T, V)": (None, lambda y: y, LAST),
    "(B, V, T)": (lambda z: z.transpose(1, 2), lambda y: y, nn.CrossEntropyLoss()),
    "(B, V, T) by permute": (lambda z: z.permute(0, -1, 1), lambda y: y, nn.CrossEntropyLoss()),
    "(B, V, T) by movedim, mT twice": (lambda z: torch.movedim(z, -1, 1).mT.mT, lambda y: y, nn.CrossEntropyLoss()),
    "(B·T, V)": (lambda z: z.view(-1, V), lambda y: y.reshape(-1), nn.CrossEntropyLoss()),
    "(B·T, V) by flatten": (lambda z: z.flatten(0, 1), lambda y: y.reshape(-1), nn.CrossEntropyLoss()),
    "(T·B, V)": (lambda z: z.transpose(0, 1).reshape(-1, V), lambda y: y.T.reshape(-1), nn.CrossEntropyLoss()),
    "shifted": (lambda z: z[:, :-1], lambda y: y[:, 1:], LAST),
    "shifted, flattened": (
        lambda z: z[..., :-1, :].contiguous().view(-1, z.size(-1)),
        lambda y: y[:, 1:].reshape(-1),
        nn.CrossEntropyLoss(),
    ),
    "the last position": (lambda z: z[:, -1], lambda y: y[:, -1], nn.CrossEntropyLoss()),
    "narrowed, an axis more and less": (
        lambda z: z.narrow(1, 1, 2).unsqueeze(0).squeeze(0),
        lambda y: y[:, 1:3],
        LAST,
    ),
    "cast": (lambda z: z.double().to(dtype=torch.float64), lambda y: y, LAST),
    "unflattened": (lambda z: z.flatten(0, 1).unflatten(0, (B, -1)), lambda y: y, LAST),
}


@pytest.mark.parametrize("cache", [0, 2**30], ids=["fresh", "kept"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("expr", ["ggn", "hessian"])
def test_products_for_every_layout_of_the_outputs(expr, layout, cache):
    after, cut, loss = LAYOUTS[layout]
    compare(build(expr), *pair(Language(after), loss, data(cut), cache=cache, memory=memory(cut)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_and_gradient(layout):
    after, cut, loss = LAYOUTS[layout]
    chunks, whole = pair(Language(after, tied=True), loss, data(cut), memory=memory(cut))
    assert chunks.value() == pytest.approx(whole.value(), rel=1e-12)
    agree(chunks.gradient(), whole.gradient())
    assert chunks.noted(HeadNotes).found and not whole.noted(HeadNotes).found


@pytest.mark.parametrize("columns", [1, 3, "loop", 2])
@pytest.mark.parametrize("cache", [0, 2**30], ids=["fresh", "kept"])
@pytest.mark.parametrize("name", POSITIONWISE)
def test_terms_that_act_on_positions(name, cache, columns):
    options = {} if columns in (1, 3) else {"columns": columns}
    compare(POSITIONWISE[name], *pair(Language(), LAST, data(), cache=cache, **options), 1 if columns == 1 else 3)


@pytest.mark.parametrize("cache", [0, 2**30], ids=["fresh", "kept"])
@pytest.mark.parametrize("name", SAMPLEWISE)
def test_terms_that_act_on_samples_where_these_are_positions(name, cache):
    compare(SAMPLEWISE[name], *pair(Language(), LAST, data(), samples="position", cache=cache), 2)
    flat, cut, loss = LAYOUTS["(B·T, V)"]
    compare(SAMPLEWISE[name], *pair(Language(flat), loss, data(cut), cache=cache))


@pytest.mark.parametrize("name", [*SAMPLEWISE, "centered_covariance"])
def test_other_terms_get_their_outputs_whole_and_explain_says_why(name):
    expr = SAMPLEWISE.get(name) or build(name)
    chunks, whole = pair(Language(), LAST, data())
    op = expr.lower(chunks)
    v = vectors(chunks)
    agree(op @ v, expr.lower(whole) @ v)
    assert not chunked(op)
    assert (
        "acts on rows of 5 positions" in op.explain() or "does not say that it acts on every position" in op.explain()
    )


WEIGHTED = CrossEntropy(
    class_axis=-1, weight=torch.linspace(0.5, 2, V).double(), ignore_index=3, label_smoothing=0.2, reduction="mean"
)
LOSSES = {
    "ignore_index": (CrossEntropy(class_axis=-1, ignore_index=3), None),
    "class weights": (CrossEntropy(class_axis=-1, weight=torch.linspace(0.5, 2, V).double()), None),
    "label smoothing": (CrossEntropy(class_axis=-1, label_smoothing=0.3), None),
    "all of them": (WEIGHTED, None),
    "sum": (CrossEntropy(class_axis=-1, reduction="sum"), None),
    "probabilities": (CrossEntropy(class_axis=-1, label_smoothing=0.1), PROBABILITIES),
    "KL divergence": (KLDivWithLogits(class_axis=-1), PROBABILITIES),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_of_the_loss_counts(name):
    loss, targets = LOSSES[name]
    batches = data() if targets is None else [(x, y) for (x, _), y in zip(data(), targets, strict=True)]
    chunks, whole = pair(Language(), loss, batches)
    compare(SUM, chunks, whole, 2)
    assert chunks.value() == pytest.approx(whole.value(), rel=1e-12)
    agree(chunks.gradient(), whole.gradient())


def test_random_layers_replay_their_draws():
    def net():
        return nn.Sequential(nn.Embedding(V, D), nn.Dropout(0.3), nn.Linear(D, V)).double().train()

    torch.manual_seed(0)
    model = net()
    compare(SUM, *pair(model, LAST, data(), randomness="frozen"))
    with pytest.raises(Exception, match="draws random numbers"):
        build("ggn").lower(pair(model, LAST, data())[0]) @ torch.ones(99).double()


def test_a_model_without_forward_ad():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    class Net(Language):
        def forward(self, tokens):
            return self.head(Square.apply(self.mix(self.embed(tokens))))

    for cache in (0, 2**30):
        chunks, whole = pair(Net(), LAST, data(), cache=cache)
        compare(build("ggn"), chunks, whole, 2)
        assert chunks.noted(TangentNotes).no_forward_ad is not None
    assert "recorded: tangent by two backward passes" in build("ggn").lower(chunks).explain()


def test_explain_says_how_tangents_are_taken():
    chunks, _ = pair(Language(), LAST, data())
    op = build("ggn").lower(chunks)
    op @ vectors(chunks)
    assert "recorded: tangent by forward AD" in op.explain()
    assert "outputs of 11 classes in chunks of 2 positions through the last linear layer (head.weight)" in op.explain()


def test_many_products_are_not_tried_by_another_route():
    chunks, whole = pair(Language(), LAST, data(), columns="loop")
    op, v = build("ggn").lower(chunks), vectors(chunks, 40)
    for _ in range(2):
        agree(op @ v, build("ggn").lower(whole) @ v)


@pytest.mark.parametrize("cache", [0, 2**30], ids=["fresh", "kept"])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("name", ["ggn", "sum"])
def test_attention(name, columns, cache):
    class Attention(Language):
        def forward(self, tokens):
            h = self.embed(tokens)
            q, k, v = (f(self.mix(h)).unsqueeze(1) for f in (torch.sin, torch.cos, torch.tanh))
            return self.head(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))

    chunks, whole = pair(Attention(), LAST, data(), cache=cache)
    compare(POSITIONWISE[name], chunks, whole, columns)
    agree(chunks.gradient(), whole.gradient())


@pytest.mark.parametrize("after", [None, lambda z: z.float(), lambda z: z.double()], ids=["", "float", "double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype, after):
    chunks, whole = pair(Language(after).to(dtype), LAST, data(), memory=0)
    v = vectors(chunks)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for expr in (build("ggn"), build("hessian")):
        op = expr.lower(chunks)
        agree(op @ v, expr.lower(whole) @ v, tolerance)
        assert chunked(op)


def test_a_changed_parameter_is_noticed_and_taken_on_request():
    model = Language()
    for cache in (0, 2**30):
        chunks, whole = pair(model, LAST, data(), cache=cache)
        op = SUM.lower(chunks)
        op @ vectors(chunks)
        with torch.no_grad():
            model.head.weight += 0.1
        with pytest.raises(StaleError, match=r"head\.weight"):
            op @ vectors(chunks)
        agree(op.refresh() @ vectors(chunks), SUM.lower(whole) @ vectors(chunks))


def test_what_is_kept_is_counted_and_the_outputs_are_not_in_it():
    chunks, whole = pair(Language(), LAST, data(), memory=0)
    sizes = []
    for problem in (chunks, whole):
        build("hessian").lower(problem) @ vectors(problem)
        sizes.append(problem.budget.used)
    first_order, _ = pair(Language(), LAST, data(), memory=0)
    build("ggn").lower(first_order) @ vectors(first_order)
    assert 0 < first_order.budget.used < sizes[0] < sizes[1]
    small = Problem(Language(), LAST, data(), output_memory=0, cache=sizes[0] // 2 + 8)
    op = build("hessian").lower(small)
    agree(op @ vectors(small), build("hessian").lower(whole) @ vectors(small))
    assert "1 batches kept" in op.explain() and small.budget.used <= small.budget.limit


@pytest.mark.parametrize("expr", ["hessian", "ggn"])
def test_no_graph_outlives_the_last_reference(expr):
    problem, _ = pair(Language(), LAST, data())
    op = build(expr).lower(problem)
    op @ vectors(problem)
    kept = next(iter(problem._cached.values()))
    recordings = [r for place in kept.keys("linearization") for r in kept.found(*place).batches.values()]
    refs = [weakref.ref(t) for r in recordings for t in (r.head.hidden, r.gamma) if t is not None]
    assert refs and all(r() is not None for r in refs)
    gc.disable()  # reference counting alone must do
    try:
        del op, kept, problem, recordings
        assert all(r() is None for r in refs)
    finally:
        gc.enable()


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.device.type != "meta":
                self.elements = max(self.elements, t.numel())
        return result


@pytest.mark.parametrize("cache", [0, 2**30], ids=["fresh", "kept"])
@pytest.mark.parametrize("name", ["ggn", "hessian", "sum"])
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_of_the_size_of_the_outputs_is_ever_made(name, cache, tied):
    classes, shape = 4000, (4, 64)
    net = nn.Sequential(nn.Embedding(classes, D), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, classes))
    if tied:
        net[3].weight = net[0].weight
    batch = (torch.randint(classes, shape), torch.randint(classes, shape))
    problem = Problem(net, LAST, batch, cache=cache, output_memory=2**20)
    op = POSITIONWISE[name].lower(problem)
    v = torch.randn(problem.size)
    for run in (
        lambda: op @ v,
        problem.value,
        problem.gradient,
        *20 * [lambda: op @ v],
    ):  # past the ways that are tried
        with Largest() as seen:
            run()
        assert seen.elements <= max(2**20 / 6 / 4, problem.size)
    assert seen.elements < batch[1].numel() * classes / 10 and chunked(op)
