"""Records are right on every batch, whatever the first one was like: each rule is compared before it is trusted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Problem, ProblemError
from curvalg.problem.layers import ROWS, LayerNotes, record_layers

D = torch.float64


def random(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def unrouted(inside):
    """Rows that a layer sees elsewhere are not looked for, so that they have to be noticed."""
    inside(routable=property(lambda use: False))


class TimeFirst(nn.Module):
    """Its layer sees the rows of the batch on the second axis."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1).sum(1)


def test_rows_that_a_linear_layer_sees_elsewhere_are_found():
    for problem in (
        make(TimeFirst(), (4, 4, 3), (2, 4, 3)),
        make(Counted(layer=Swapped()), (40, 40, 3)),
        Problem(
            Sorted().double(), nn.MSELoss(), [(x, torch.zeros(len(x), 2).double()) for x in sorted_batches(4, 6, 40)]
        ),
    ):
        check(problem)
        assert problem.noted(LayerNotes).reasons == {}


class Branch(nn.Module):
    """Uses its second layer on large batches only."""

    def __init__(self, second=None):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), second or nn.Linear(3, 2)

    def forward(self, x):
        z = self.first(x).sum(1)
        return (
            z + (self.second(x) if isinstance(self.second, TimeFirst) else self.second(x).sum(1)) if len(x) > 2 else z
        )


class Square(torch.autograd.Function):
    """x ∘ w², whose use of w no function of torch shows."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w**2

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w**2, (2 * g * x * w).sum(0)


class Hidden(nn.Module):
    """A parameter that reaches the output through a custom function only."""

    def __init__(self):
        super().__init__()
        self.w, self.layer = nn.Parameter(random(3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(Square.apply(x, self.w))


def make(model, *shapes, dtype=D):
    return Problem(
        model.to(dtype), nn.MSELoss(), [(random(*s, dtype=dtype), random(s[0], 2, dtype=dtype)) for s in shapes]
    )


def by_rows(evaluation, cotangents):
    """The gradients of every column and row, one backward pass each."""
    z, leaves, _ = evaluation.record()
    names = evaluation.problem.layout.names
    found = {name: torch.zeros(*cotangents.shape[:2], *p.shape, dtype=p.dtype) for name, p in zip(names, leaves)}
    for k in range(cotangents.shape[0]):
        for n in range(cotangents.shape[1]):
            only = torch.zeros_like(z)
            only[n] = cotangents[k, n]
            grads = torch.autograd.grad(z, leaves, only, retain_graph=True, allow_unused=True)
            for name, g in zip(names, grads):
                if g is not None:
                    found[name][k, n] = g
    return found


def check(problem, columns=2, cotangent=random, tolerance=1e-10):
    """All batches against single rows; the records of all batches, and their Gram matrices."""
    batches = []
    with problem.differentiating():
        for evaluation in problem.evaluations(problem.snapshot()):
            recorded = record_layers(evaluation)
            s = cotangent(columns, *recorded.z.shape, dtype=recorded.z.dtype)
            records, expected = recorded.records(s), by_rows(evaluation, s)
            for record in records:
                for name, g in record.explicit().items():
                    assert (g - expected[name]).norm() <= tolerance * max(1.0, float(expected[name].norm()))
            batches.append((records, expected))
    for records, expected in batches:
        for others, other in batches:
            # Code that compares batches looks a record up by its parameters.
            matched = {record.params: record for record in others}
            for record in records:
                gram = sum(torch.einsum("kn...,lm...->knlm", expected[p], other[p]) for p in record.params)
                got = record.gram(matched[record.params])
                assert (got - gram).norm() <= 10 * tolerance * max(1.0, float(gram.norm()))
    return [records for records, _ in batches]


@pytest.mark.usefixtures("unrouted")
def test_a_single_row_proves_nothing():
    problem = make(TimeFirst(), (1, 4, 3), (4, 4, 3))
    check(problem)
    assert problem.noted(LayerNotes).reasons.keys() == {"layer.weight", "layer.bias"}


@pytest.mark.usefixtures("unrouted")
def test_cotangents_that_vanish_prove_nothing():
    """The comparison has cotangents of its own."""
    problem = make(TimeFirst(), (4, 4, 3), (4, 4, 3))
    first = [True]

    def cotangent(*shape, dtype):
        if first.pop() if first else False:
            return torch.zeros(shape, dtype=dtype)
        return random(*shape, dtype=dtype)

    check(problem, cotangent=cotangent)
    assert "do not add up" in problem.noted(LayerNotes).reasons["layer.weight"]


@pytest.mark.usefixtures("unrouted")
def test_gradients_that_vanish_prove_nothing():
    class Gated(TimeFirst):
        """Zero on batches without a positive number."""

        def forward(self, x):
            return super().forward(x) * (x.amax() > 0)

    y = random(4, 2)
    batches = [(-random(4, 4, 3).abs(), y), (random(4, 4, 3), y)]
    problem = Problem(Gated().double(), nn.MSELoss(), batches)
    check(problem)
    assert problem.noted(LayerNotes).reasons.keys() == {"layer.weight", "layer.bias"}


@pytest.mark.usefixtures("unrouted")
def test_a_layer_that_comes_later_is_compared_then():
    problem = make(Branch(TimeFirst()), (2, 4, 3), (4, 4, 3))
    check(problem)
    assert problem.noted(LayerNotes).reasons.keys() == {"second.layer.weight", "second.layer.bias"}


@pytest.mark.parametrize("rows", [(2, 4), (4, 2)])
def test_batches_use_different_layers(rows):
    """Records keep their grouping, so that Gram matrices between batches find their partners."""
    problem = make(Branch(), *[(n, 4, 3) for n in rows])
    every = check(problem)
    assert [[r.params for r in records] for records in every] == [[r.params for r in every[0]]] * 2
    assert problem.noted(LayerNotes).reasons == {}


def test_a_parameter_that_no_function_shows():
    problem = make(Hidden(), (4, 3), (5, 3))
    check(problem)
    assert problem.noted(LayerNotes).reasons == {"w": "it is used where no function of torch shows it"}


def test_trusted_rules_are_not_compared_again(inside):
    compared = []
    original = inside["compare_layers"]
    inside(compare_layers=lambda *args: compared.append(1) or original(*args))
    check(make(nn.Linear(3, 2), (4, 3), (5, 3), (3, 3)))
    assert len(compared) == 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_round_off_is_no_mistake(dtype, tolerance):
    net = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2))
    problem = make(net, (16, 30), dtype=dtype)
    with problem.differentiating():
        (evaluation,) = problem.evaluations(problem.snapshot())
        recorded = record_layers(evaluation)
        s = random(2, *recorded.z.shape, dtype=recorded.z.dtype)
        records, expected = recorded.records(s), by_rows(evaluation, s)
    assert problem.noted(LayerNotes).reasons == {}
    for record in records:
        for name, g in record.explicit().items():
            assert g.dtype == torch.float32
            assert (g - expected[name]).norm() <= tolerance * expected[name].float().norm()


def test_an_operation_that_cannot_be_batched():
    """Columns then go through one after the other."""

    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            if not float(g.sum()) < 1e300:  # reading a number is what vmap forbids
                raise AssertionError
            return g

    class Net(nn.Sequential):
        def forward(self, x):
            return Stubborn.apply(super().forward(x))

    check(make(Net(nn.Linear(3, 2)), (4, 3), (5, 3)), columns=3)


def test_gradients_that_no_route_gives_are_an_error():
    class Drifting(nn.Module):
        """Another function in every call."""

        def __init__(self):
            super().__init__()
            self.w, self.calls = nn.Parameter(random(3, 2)), [0]

        def forward(self, x):
            self.calls[0] += 1
            return x @ self.w * float(self.calls[0])

    problem = make(Drifting(), (4, 3))
    with problem.differentiating(), pytest.raises(ProblemError, match="same in every call"):
        record_layers(next(iter(problem.evaluations(problem.snapshot())))).records(random(1, 4, 2))


def test_cotangents_of_a_wrong_shape_are_refused():
    problem = make(nn.Linear(3, 2), (4, 3))
    with problem.differentiating():
        recorded = record_layers(next(iter(problem.evaluations(problem.snapshot()))))
        with pytest.raises(ProblemError, match=r"\(columns, 4, 2\)"):
            recorded.records(random(4, 2))


def test_a_model_that_fails_is_named():
    problem = make(nn.Linear(3, 2), (4, 5))
    with problem.differentiating(), pytest.raises(ProblemError, match="failed on batch 0"):
        record_layers(next(iter(problem.evaluations(problem.snapshot()))))


class Counted(nn.Module):
    """Remembers how many rows each of its calls had; uses its second layer on batches larger than ``limit`` only."""

    def __init__(self, limit=0, layer=None):
        super().__init__()
        self.first, self.second, self.limit, self.rows = layer or nn.Linear(3, 2), nn.Linear(3, 2), limit, []

    def forward(self, x):
        self.rows.append(len(x))
        z = self.first(x).sum(1)
        return z + self.second(x).sum(1) if len(x) > self.limit else z


def test_a_large_batch_is_compared_on_a_few_rows():
    problem = make(Counted(), (40, 4, 3))
    check(problem)
    assert problem.model.module.rows.count(ROWS) == 1
    assert problem.noted(LayerNotes).compared.keys() == set(problem.layout.names)


def test_rows_that_use_other_layers_when_alone_are_compared_together():
    problem = make(Counted(limit=20), (40, 4, 3))
    check(problem)
    assert problem.noted(LayerNotes).compared.keys() == set(problem.layout.names)


class Swapped(nn.Module):
    """A layer that sees the rows of the batch on the second axis, where there are as many as on the first."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.usefixtures("unrouted")
def test_a_wrong_rule_is_seen_on_a_few_rows():
    problem = make(Counted(layer=Swapped()), (40, 40, 3))
    check(problem)
    assert problem.noted(LayerNotes).reasons.keys() == {"first.layer.weight", "first.layer.bias"}
    assert ROWS in problem.model.module.rows


class Flattened(nn.Module):
    """Large batches go through its layer as one list of positions, other rows together; the result is the same."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        if len(x) <= 20:
            return self.layer(x)
        rows, length, width = x.shape
        return self.layer(x.transpose(0, 1).reshape(-1, width)).reshape(length, rows, 2).transpose(0, 1)


@pytest.mark.usefixtures("unrouted")
def test_few_rows_say_nothing_where_they_go_another_way_to_the_same_result():
    problem = make(Counted(layer=Flattened()), (40, 5, 3))
    check(problem)
    assert problem.noted(LayerNotes).reasons.keys() == {"first.layer.weight", "first.layer.bias"}


class Sorted(nn.Module):
    """Computes its hidden layer on rows sorted by their first number, as models sort sequences by length."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.out(torch.tanh(self.hidden(x[order]))[order.argsort()])


def sorted_batches(*counts):
    """Batches of which the first is in order, and a large one whose first rows are."""
    X = [random(n, 3, seed=n) for n in counts]
    X[0] = X[0][X[0][:, 0].argsort()]
    X[-1][:9] = X[-1][:9][X[-1][:9, 0].argsort()]
    X[-1][:9, 0] -= 10
    return X


@pytest.mark.usefixtures("unrouted")
@pytest.mark.parametrize("reverse", [False, True])
def test_rows_that_change_places_on_some_batches_are_seen_on_those(reverse):
    """Nothing that holds for the first batch, or for the first rows of one, tells the order of rows elsewhere."""
    X = sorted_batches(4, 6, 40)[:: -1 if reverse else 1]
    problem = Problem(Sorted().double(), nn.MSELoss(), [(x, torch.zeros(len(x), 2).double()) for x in X])
    check(problem)
    assert problem.noted(LayerNotes).reasons.keys() == {"hidden.weight", "hidden.bias"}


@pytest.mark.parametrize("counts", [(4, 6, 40), (40,)])
def test_gradients_of_rows_that_change_places(counts):
    from curvalg import registry

    X = sorted_batches(*counts)
    problem = Problem(Sorted().double(), nn.MSELoss(), [(x, random(len(x), 2, seed=len(x))) for x in X])
    J = registry.build("jacobian").lower(problem).to_dense()
    kernel = registry.build("ntk").lower(problem).to_dense()
    assert (kernel - J @ J.T).norm() <= 1e-10 * kernel.norm()
    covariance = registry.build("covariance").lower(problem)
    values = covariance.exact("eigh").eigenvalues
    exact = torch.linalg.eigvalsh(covariance.to_dense())
    assert torch.allclose(values[-5:], exact[-5:], rtol=1e-9)
    with problem.batches() as batches:
        rows = [torch.cat([g.flatten(1) for g in b.per_sample_gradients().values()], 1) for b in batches]
    G = torch.cat(rows)
    assert (problem.totals.scale * G.T @ G - covariance.to_dense()).norm() <= 1e-10 * covariance.to_dense().norm()


def test_rows_without_a_cotangent_are_not_taken_as_checked():
    """The first product sees only rows that stay where they are."""
    X = random(24, 3)
    X = X[X[:, 0].argsort()]
    X[12:] = X[12:].flip(0)  # the first half is in order, and so are the few rows that are compared
    problem = Problem(Sorted().double(), nn.MSELoss(), [(X, torch.zeros(24, 2).double())])
    snapshot = problem.snapshot()
    with problem.differentiating():
        for half in (slice(0, 12), slice(12, 24)):
            (evaluation,) = problem.evaluations(snapshot)
            s = torch.zeros(1, 24, 2, dtype=D)
            s[:, half] = random(1, 12, 2)
            expected = by_rows(evaluation, s)
            for record in record_layers(evaluation).records(s):
                for name, g in record.explicit().items():
                    assert (g - expected[name]).norm() <= 1e-10


def test_each_batch_is_checked_once(inside):
    calls = []
    misplaced = inside["misplaced"]
    inside(misplaced=lambda *a: calls.append(1) or misplaced(*a))
    problem = make(Counted(), (40, 4, 3), (7, 4, 3))
    check(problem)
    first = len(calls)
    check(problem)
    assert len(calls) == first == 3  # two batches, and the few rows of the large one
    plain = make(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3))
    check(plain)
    assert len(calls) == first  # nothing in it can move rows
    with torch.no_grad():
        problem.model.module.first.bias += 1  # rows may be in other places now
    check(problem)
    assert len(calls) == first + 2
