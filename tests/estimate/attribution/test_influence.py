"""Scores of training samples for queries, against gradients of single samples in plain torch."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from curvalg import (
    Block,
    Diagonal,
    ExpressionError,
    Identity,
    Kronecker,
    Problem,
    ProblemError,
    VectorError,
    block_diagonal,
    estimate,
    inverse,
    registry,
)
from curvalg.estimate import influence, influence_stream, self_influence
from tests.support.inside import first_wins
from tests.support.scored import (
    MATRICES,
    MODELS,
    D,
    build,
    close,
    dense,
    gradients,
    random,
    words,
    world,
)


@pytest.mark.parametrize("query_batch", [3, 64])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_inner_products(name, matrix, query_batch):
    problem, queries, G, V = world(name)
    if name == "words" and matrix == "damped by name":
        pytest.skip("tables have no factors that a diagonal damps by name")
    op = MATRICES[matrix]().lower(problem)
    expected = V @ (op @ G.T)
    found = influence(op, queries, query_batch=query_batch)
    assert found.scores.shape == (9, 14) and found.products == 9 and found.converged
    close(found.scores, expected)
    close(self_influence(op), 14 * (G * (op @ G.T).T).sum(1))
    by_layer = influence(op, queries, by="layer", query_batch=query_batch).scores
    close(sum(by_layer.values()), expected)
    assert set(by_layer) == {p.rpartition(".")[0] for p in problem.layout.names}


ARRAYS = ("ekfac", "kfac", "kfac apart", "ekfac itself", "damped by name", "diagonal", "identity")


@pytest.mark.parametrize("matrix", ARRAYS)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_right_without_their_check(name, matrix):
    """Nothing that is compared and replaced hides what is wrong with them."""
    if name == "words" and matrix == "damped by name":
        pytest.skip("tables have no factors that a diagonal damps by name")
    problem, queries, G, V = world(name, verify=False)
    op = MATRICES[matrix]().lower(problem)
    for query_batch in (2, 64):
        close(influence(op, queries, query_batch=query_batch).scores, V @ (op @ G.T))
    close(self_influence(op), 14 * (G * (op @ G.T).T).sum(1))


def test_scores_of_layers_are_of_their_parameters():
    problem, queries, G, V = world("dense")
    op = inverse(build("ekfac") + 0.1 * Identity).lower(problem)
    AV = (op @ V.T).T
    for layer, scores in influence(op, queries, by="layer").scores.items():
        inside = [problem.layout.slices[p] for p in problem.layout.names if p.startswith(layer + ".")]
        close(scores, sum(AV[:, s] @ G[:, s].T for s in inside))


def test_positions_are_samples_where_the_problem_says_so():
    problem, queries, _, _ = world("words", samples="position")
    with problem.batches() as batches:
        G = torch.cat([torch.cat([g.flatten(1) for g in b.per_sample_gradients().values()], 1) for b in batches])
    with queries.batches() as batches:
        V = torch.cat([torch.cat([g.flatten(1) for g in b.per_sample_gradients().values()], 1) for b in batches])
    V = V * queries.totals.scale
    op = inverse(build("ekfac", fisher="empirical") + 0.1 * Identity).lower(problem)
    expected = V @ (op @ G.T)
    for batch in (2, 7, 64):
        close(influence(op, queries, query_batch=batch).scores, expected)
    close(self_influence(op), problem.totals.scale * (G * (op @ G.T).T).sum(1))


def test_queries_default_to_the_training_samples():
    problem, _, G, _ = world("dense")
    op = inverse(build("ekfac") + 0.1 * Identity).lower(problem)
    close(influence(op).scores, 14 * G @ (op @ G.T))
    close(influence(op).scores.diagonal(), self_influence(op))


@pytest.mark.parametrize("matrix", ["ekfac", "cg"])
def test_positions_of_a_row_add_up(matrix):
    """The shares of the places at which layers see a training row: gradients of a layer with its deltas elsewhere zero."""
    net, loss, data = words()
    train, test = data(6, 1), data(4, 2)
    problem, queries = Problem(net, loss, train), Problem(net, loss, test)
    op = MATRICES[matrix]().lower(problem)
    scores = influence(op, queries, by="position").scores
    assert scores.shape == (4, 6, 5)
    close(scores.sum(2), influence(op, queries).scores)
    AV = (op @ (gradients(net, loss, *test, 1.0)).T).T
    only = Problem(net, loss, train, params=["head.weight"])
    own = inverse(build("ekfac", joint=False) + 0.1 * Identity).lower(only)
    found = influence(own, Problem(net, loss, test, params=["head.weight"]), by="position").scores
    with torch.no_grad():
        h = torch.tanh(net.mix((n := net.norm(net.table(train[0]))) + n.cumsum(1) / 4))
        delta = (net.head(h).softmax(-1) - nn.functional.one_hot(train[1], 7)) / 30
    at = gradients(net, loss, *test, 1.0)[:, problem.layout.slices["head.weight"]]
    U = (own @ at.T).T.reshape(4, 7, 10)
    close(found, torch.einsum("qoi,nti,nto->qnt", U, h, delta))
    assert AV.shape[0] == 4


@pytest.mark.parametrize("k", [1, 4, 20])
def test_extremes_are_those_of_all_scores(k):
    problem, queries, _, _ = world("dense")
    op = inverse(build("ekfac") + 0.1 * Identity).lower(problem)
    every, found = influence(op, queries).scores, influence(op, queries, topk=k, query_batch=4)
    assert found.scores is None
    count = min(k, 14)
    for falling, values, samples in (
        (True, found.topk.largest, found.topk.largest_samples),
        (False, found.topk.smallest, found.topk.smallest_samples),
    ):
        assert values.shape == samples.shape == (9, count)
        close(values, every.sort(1, descending=falling).values[:, :count])
        close(every.gather(1, samples), values)


@pytest.mark.parametrize("by", ["total", "layer", "position"])
def test_streams_give_the_same_scores(by):
    problem, queries, _, _ = world("words")
    op = inverse(build("ekfac") + 0.1 * Identity).lower(problem)
    whole = influence(op, queries, by=by, query_batch=4).scores
    seen = torch.zeros(9, 14)
    assert influence.stream is influence_stream
    for part in influence.stream(op, queries, by=by, query_batch=4):
        seen[part.queries, part.samples] += 1
        for key, scores in part.scores.items() if by == "layer" else [(None, part.scores)]:
            of = whole if key is None else whole[key]
            assert torch.equal(of[part.queries, part.samples], scores)
    assert bool((seen == 1).all())
    assert torch.is_grad_enabled()


def test_solves_are_reported():
    problem, queries, _, _ = world("dense")
    exact = influence(inverse(build("ekfac") + 0.1 * Identity).lower(problem), queries)
    assert exact.iterations is None and exact.residuals is None
    op = inverse(build("ggn") + 0.5 * Identity, solver="cg", rtol=1e-9).lower(problem)
    found = influence(op, queries, query_batch=4)
    assert found.iterations.shape == found.residuals.shape == (9,) and bool((found.iterations > 0).all())
    norms = world("dense")[3].norm(dim=1)
    assert bool((found.residuals <= 1e-9 * norms).all())


@pytest.mark.parametrize("options", [{}, {"by": "layer"}, {"topk": 3}])
def test_interrupted_runs_go_on_to_the_same_bits(options, tmp_path, products, inside):
    # The file keeps what the clock has chosen, but the whole run is another one.
    inside(measure=first_wins, overhead=0.0)

    def asked(path):
        problem, queries, _, _ = world("dense")
        op = inverse(build("ggn") + 0.5 * Identity, solver="cg", rtol=1e-9).lower(problem)
        return influence(op, queries, query_batch=2, checkpoint=path, **options)

    whole = asked(None)
    products.interrupt(3)
    part = asked(tmp_path / "scores")
    assert part.partial and part.products == 4
    found = asked(tmp_path / "scores")
    assert not found.partial and found.products == 9
    for a, b in zip(_tensors(found), _tensors(whole), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(Exception, match="another run"):
        problem, queries, _, _ = world("dense")
        influence(inverse(build("ekfac") + Identity).lower(problem), queries, checkpoint=tmp_path / "scores")


def _tensors(result):
    if result.topk is not None:
        return [result.topk.largest, result.topk.largest_samples, result.topk.smallest, result.topk.smallest_samples]
    return list(result.scores.values()) if isinstance(result.scores, dict) else [result.scores]


@pytest.mark.parametrize("what", ["values", "basis"])
def test_wrong_blocks_are_not_believed(what, inside):
    """A structure that is not the operator's is noticed, and the operator's own products are taken."""
    problem, queries, G, V = world("dense")
    op = inverse(build("ekfac") + 0.1 * Identity).lower(problem)
    expected = V @ (op @ G.T)
    at, planted = inside["structure"], {}

    def planting(self, snapshot):
        structure = at(self, snapshot)
        block = structure.parts[0][1] if hasattr(structure, "parts") else structure
        if id(block) in planted:
            return structure
        planted[id(block)] = block
        if what == "values":
            block.values = block.values.roll(1)
        else:
            block.basis.factors[0] = block.basis.factors[0].flip(0)
        return structure

    with inside.within(structure=planting):
        found = influence(op, queries).scores
    close(found, expected)


def test_many_gradients_are_taken_by_layers():
    problem, _, G, _ = world("words")
    op = inverse(build("ekfac") + 0.1 * Identity).lower(problem)
    v = random(problem.size, 30)
    close(influence(op, v), G @ (op @ v))


def test_requests_that_make_no_sense():
    problem, queries, _, _ = world("dense")
    op = inverse(build("ekfac") + 0.1 * Identity).lower(problem)
    other = Problem(nn.Linear(9, 3).to(D), nn.CrossEntropyLoss(), (random(4, 9), torch.arange(4) % 3))
    moved = dense()[0]
    with torch.no_grad():
        moved[0].weight += 1
    elsewhere = Problem(moved, nn.CrossEntropyLoss(), (random(4, 9), torch.arange(4) % 3))
    for asked, options, message in (
        (other, {}, r"queries has no '0\.weight'; make the problem of the queries with the same model"),
        (elsewhere, {}, "their values differ"),
        (queries, {"by": "sample"}, "by to be one of"),
        (queries, {"topk": 0}, "topk to be an integer"),
        (queries, {"topk": 2, "by": "layer"}, "topk= is for scores by='total'"),
        (queries, {"query_batch": 0}, "query_batch to be an integer"),
        (problem.gradient(), {"by": "layer"}, "by= is for queries that are a Problem"),
    ):
        with pytest.raises(ExpressionError, match=message):
            influence(op, asked, **options)
    with pytest.raises(ExpressionError, match="all 251 parameters"):
        self_influence(build("loss_hessian").lower(problem))


def test_hand_made_blocks():
    """Blocks of any kind beside each other, and parameters in another order."""
    problem, queries, G, V = world("dense")
    shapes = problem.layout.shapes
    A = (lambda m: m @ m.T)(random(9, 9, seed=4))
    B = (lambda m: m @ m.T)(random(12, 12, seed=5))
    blocks = [
        Block(("4.weight", "2.bias"), Diagonal(random(32, seed=6).abs() + 1)),
        Block(("0.weight",), Kronecker(B, A)),
        Block(("0.bias", "2.weight", "4.bias"), 2 * Identity),
    ]
    assert shapes["4.weight"].numel() + shapes["2.bias"].numel() == 32
    lopsided = [Block(b.params, Kronecker(B, A + random(9, 9)) if "0.weight" in b.params else b.expr) for b in blocks]
    for expr in (
        block_diagonal(blocks),
        inverse(block_diagonal(blocks) + 0.3 * Identity),
        inverse(block_diagonal(lopsided), check=False),
    ):
        op = expr.lower(problem)
        close(influence(op, queries).scores, (G @ (op @ V.T)).T)  # not the other way round, where A is lopsided
        close(self_influence(op), 14 * (G * (op @ G.T).T).sum(1))


def test_two_threads_do_not_wait_for_each_other():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = torch.randn(17, 4).double(), torch.randint(0, 3, (17,))
    for _ in range(6):
        problem = Problem(net, nn.CrossEntropyLoss(), [(X[:8], y[:8]), (X[8:], y[8:])])
        op = inverse(registry.build("ekfac") + 0.1 * Identity).lower(problem)
        threads = [threading.Thread(target=estimate.influence, args=(op, problem), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)


def test_queries_of_another_precision_are_refused():
    torch.manual_seed(0)
    single = nn.Linear(3, 2)
    double = nn.Linear(3, 2).double()
    double.load_state_dict(single.state_dict())
    X, y = torch.randn(5, 3), torch.randint(2, (5,))
    problem = Problem(double, nn.CrossEntropyLoss(), (X.double(), y))
    op = inverse(registry.build("ekfac") + Identity).lower(problem)
    for ask in (estimate.influence, estimate.functional_variance):
        with pytest.raises(ExpressionError, match="precision"):
            ask(op, Problem(single, nn.CrossEntropyLoss(), (X, y)))


def test_a_single_row_without_its_axis_is_refused():
    problem = Problem(
        nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), (torch.randn(5, 4).double(), torch.arange(5) % 3)
    )
    op = inverse(registry.build("kfac") + Identity).lower(problem)
    with pytest.raises(ProblemError, match="None"):
        estimate.functional_variance(op, problem.with_inputs(torch.randn(4).double()))


def test_no_gradients_ask_nothing():
    problem, _, _, _ = world("dense")
    op = inverse(registry.build("ekfac") + Identity).lower(problem)
    with pytest.raises(VectorError, match="at least one gradient"):
        influence(op, torch.zeros(problem.size, 0, dtype=torch.float64))
