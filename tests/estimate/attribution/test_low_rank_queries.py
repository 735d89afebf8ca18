"""Products held as low-rank factors: their scores, against truncated matrices in plain torch, and the errors they state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvalg import (
    Block,
    Diagonal,
    ExpressionError,
    Identity,
    OptionError,
    Problem,
    block_diagonal,
    estimate,
    inverse,
    registry,
)
from curvalg.estimate import influence, influence_stream
from curvalg.files import load, save
from tests.support.inside import first_wins
from tests.support.scored import MATRICES, MODELS, close, gradients, random, world

build = registry.build
ARRAYS = ("ekfac", "kfac", "kfac apart", "ekfac itself", "diagonal", "identity")
BY_LAYER = {"by": "layer"}, {"by": "position"}


def best(matrix, rank):
    """The best approximation of one matrix, by its singular value decomposition."""
    U, s, V = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ V[:rank]


def held(product, problem, matrix, rank):
    """A product (D,) of which the weights, with their biases where they share a block, are best approximations."""
    joint, parts = "apart" not in matrix, problem.layout.unflatten(product)
    found = {name: value.clone() for name, value in parts.items()}
    for name in (n for n in parts if n.endswith("weight") and parts[n].ndim > 1):
        bias, whole = name.replace("weight", "bias"), parts[name].flatten(1)
        with_bias = joint and bias in parts
        found_part = best(torch.cat([whole, parts[bias][:, None]], 1) if with_bias else whole, rank)
        found[name] = found_part[:, : whole.shape[1]].reshape(parts[name].shape)
        if with_bias:
            found[bias] = found_part[:, -1]
    return problem.layout.flatten(found)


@pytest.mark.parametrize("query_batch", [3, 64])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("matrix", ARRAYS)
def test_scores_are_those_of_truncated_matrices(matrix, rank, query_batch):
    problem, queries, G, V = world("dense")
    op = MATRICES[matrix]().lower(problem)
    products = (op @ V.T).T
    apart = "apart" if matrix == "kfac apart" else matrix
    expected = torch.stack([held(product, problem, apart, rank) for product in products])
    found = influence(op, queries, query_rank=rank, query_batch=query_batch)
    close(found.scores, expected @ G.T)
    assert found.error.rank == rank and found.products == 9
    close(found.error.total + 1, (products - expected).norm(dim=1) + 1)
    assert bool(((products - expected) @ G.T).abs().le(found.error.bound() + 1e-12).all())


@pytest.mark.parametrize("matrix", ARRAYS)
@pytest.mark.parametrize("name", MODELS)
def test_full_rank_is_exact(name, matrix):
    problem, queries, _, _ = world(name)
    op = MATRICES[matrix]().lower(problem)
    for options in ({}, *BY_LAYER):
        exact, found = influence(op, queries, **options), influence(op, queries, query_rank=100, **options)
        for a, b in zip(tensors(found.scores), tensors(exact.scores), strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm()
        assert float(found.error.total.max()) == 0.0


def tensors(scores):
    return list(scores.values()) if isinstance(scores, dict) else [scores]


@pytest.mark.parametrize("matrix", ["ekfac", "kfac apart", "identity"])
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 4), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_no_error_is_larger_than_its_bound(name, matrix, seed, rank, scale):
    problem, queries, _, _ = world(name)
    with torch.no_grad():
        for i, parameter in enumerate(problem.model.given.parameters()):
            parameter.copy_(scale * random(*parameter.shape, seed=seed + i))
    problem.refresh()
    queries.refresh()
    op = MATRICES[matrix]().lower(problem)
    net, loss, data = problem.model.given, None, MODELS[name]()[2]
    G, V = gradients(net, loss, *data(14, 1), 1 / 14), gradients(net, loss, *data(9, 2), 1.0)
    rounding = 1e-12 * torch.outer((op @ V.T).abs().sum(0), G.abs().sum(1))  # squares would be zero
    rounding += torch.finfo(rounding.dtype).tiny  # of gradients that are next to nothing no digit is exact
    for options in ({}, *BY_LAYER):
        exact = tensors(influence(op, queries, **options).scores)
        found = influence(op, queries, query_rank=rank, **options)
        several = isinstance(found.scores, dict)
        bounds = found.error.bound_by_layer() if several else {None: found.error.bound()}
        scores = found.scores if several else {None: found.scores}
        for (key, score), true in zip(scores.items(), exact, strict=True):
            bound = bounds.get(key, torch.zeros_like(score))  # a layer of vectors is exact
            assert bound.shape == score.shape
            allowed = rounding if score.ndim == 2 else rounding[..., None]
            assert bool(((score - true).abs() <= bound * (1 + 1e-9) + allowed).all())


def test_bounds_are_products_of_norms():
    """Of what is missing, and of the gradients of each layer; they are not far from errors."""
    problem, queries, G, _ = world("dense")
    op = inverse(build("ekfac") + 0.1 * Identity).lower(problem)
    found = influence(op, queries, query_rank=1).error
    parts = [[problem.layout.slices[f"{layer}.{kind}"] for kind in ("weight", "bias")] for layer in found.norms]
    for name, (weight, bias) in zip(found.norms, parts, strict=True):
        close(found.norms[name], torch.cat([G[:, weight], G[:, bias]], 1).norm(dim=1))
        close(found.bound_by_layer()[name], torch.outer(found.discarded[name], found.norms[name]))
    close(found.bound(), sum(found.bound_by_layer().values()))
    samples = torch.arange(18).reshape(9, 2) % 14
    close(found.bound_of(samples), found.bound().gather(1, samples))
    errors = (influence(op, queries, query_rank=1).scores - influence(op, queries).scores).abs()
    assert float((errors / found.bound()).max()) > 0.1


@pytest.mark.parametrize("places", [2, 40])
def test_norms_of_sums_over_positions(places):
    """From inner products of pairs of positions where these are few, else from the matrices."""
    net = nn.Linear(4, 3).double()
    X, y = random(5, places, 4), random(5, places, 3, seed=1)
    problem = Problem(net, nn.MSELoss(reduction="sum"), (X, y))
    norms = influence((1.0 * Identity).lower(problem), query_rank=1).error.norms[""]
    deltas = 2 * (net(X) - y)
    G = torch.cat([deltas.mT @ X, deltas.sum(1)[..., None]], 2).flatten(1)
    assert torch.allclose(norms, G.norm(dim=1), rtol=1e-5)
    assert bool((norms >= G.norm(dim=1)).all())
    shares = influence((1.0 * Identity).lower(problem), query_rank=1, by="position").error.norms[""]
    assert torch.allclose(shares, deltas.norm(dim=2) * (X.square().sum(2) + 1).sqrt())


def test_few_positions_lose_nothing():
    """A product with Kronecker factors of a gradient of T positions has rank T."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 8)).double()
    problem, queries = (
        Problem(net, nn.MSELoss(), (random(n, 3, 12, seed=n), random(n, 3, 8, seed=1))) for n in (20, 6)
    )
    op = build("kfac").lower(problem)
    exact, found = influence(op, queries), influence(op, queries, query_rank=3)
    assert float(found.error.total.max()) <= 1e-12 * float(exact.scores.abs().max())
    close(found.scores, exact.scores)
    assert float(influence(op, queries, query_rank=2).error.total.min()) > 0


class Fixed(nn.Module):
    """A layer whose gradient at row n is the n-th of some matrices."""

    def __init__(self, matrices):
        super().__init__()
        self.layer = nn.Linear(matrices.shape[2], matrices.shape[1], bias=False).to(matrices.dtype)

    def forward(self, pairs):
        inputs, deltas = pairs
        return (self.layer(inputs) * deltas).sum((1, 2))


def queries_of(matrices):
    """A problem whose samples have these gradients (Q, out, in): sums over positions of products of singular vectors."""
    U, values, Vh = torch.linalg.svd(matrices, full_matrices=False)
    net = Fixed(matrices)
    return Problem(net, lambda z, t: (z * t).sum(), ((Vh, (U * values[:, None]).mT), torch.ones(len(matrices)).to(U)))


@pytest.mark.parametrize("shape", [(5, 7, 11), (4, 12, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncation_is_the_best(shape, dtype):
    decay = torch.logspace(0, -6, min(shape[1:])).to(dtype)
    U, V = (torch.linalg.qr(random(shape[0], n, len(decay), seed=n).to(dtype))[0] for n in shape[1:])
    matrices, eps = (U * decay) @ V.mT, torch.finfo(dtype).eps
    problem = queries_of(matrices)
    op = inverse(build("kfac", fisher="empirical") + 0.1 * Identity).lower(problem)
    directions = (op @ matrices.reshape(len(matrices), -1).T.contiguous()).T.reshape(matrices.shape)
    U, values, Vh = torch.linalg.svd(directions, full_matrices=False)
    for rank in (1, 3, min(shape[1:])):
        found = influence(op, query_rank=rank)
        missing = values[:, rank:].square().sum(1).sqrt()
        best = (U[..., :rank] * values[:, None, :rank]) @ Vh[:, :rank]
        size = float(values.max())
        assert torch.allclose(found.error.total, missing, rtol=1e-3, atol=200 * eps * size)
        assert torch.allclose(
            found.scores, torch.einsum("qoi,noi->qn", best, matrices), rtol=1e-3, atol=1e3 * eps * size
        )


def test_small_numbers_have_bounds():
    """Squares of what is missing, and of gradients, would be zero."""
    for places in (1, 3):
        X, y = torch.ones(2, places, 2), torch.zeros(2, places, 3)
        problem = Problem(net := nn.Linear(2, 3), lambda z, t: 1e-30 * (z - t).sum(), (X, y))
        norms = influence((1.0 * Identity).lower(problem), query_rank=1).error.norms[""]
        assert torch.allclose(norms * 1e30, torch.full((2,), 3.0 * places), rtol=1e-2), net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_that_were_learnt_by_heart_do_not_cost_the_blocks(dtype):
    """Squares of their gradients are zero, and rounding of inner products with these is not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    X, y = random(6, 4).to(dtype), torch.arange(6) % 3
    weights = torch.tensor([1.0, 1e-25, 1e-26, 1e-27, 1e-28, 1.0]) ** (1 if dtype == torch.float32 else 7)
    weigh = lambda z, t: (t[:, 1].to(z.dtype) * nn.functional.cross_entropy(z, t[:, 0].long(), reduction="none")).sum()
    problem = Problem(net, weigh, (X, torch.stack([y.double(), weights.double()], 1)))
    op = inverse(build("kfac", fisher="empirical") + 0.1 * Identity).lower(problem)
    assert influence(op, query_rank=9).scores.shape == (6, 6)


@pytest.mark.parametrize("k", [1, 4])
def test_extremes_and_streams(k):
    problem, queries, _, _ = world("dense")
    op = inverse(build("ekfac") + 0.1 * Identity).lower(problem)
    every = influence(op, queries, query_rank=2, query_batch=4)
    found = influence(op, queries, query_rank=2, query_batch=4, topk=k)
    assert torch.equal(found.topk.largest, every.scores.sort(1, descending=True).values[:, :k])
    close(found.error.bound_of(found.topk.largest_samples), every.error.bound().gather(1, found.topk.largest_samples))
    for part in influence_stream(op, queries, query_rank=2, query_batch=4):
        assert torch.equal(part.scores, every.scores[part.queries, part.samples])
        close(part.error.bound(), every.error.bound()[part.queries, part.samples])


@pytest.mark.parametrize("options", [{}, {"by": "layer"}, {"by": "position"}, {"topk": 3}])
def test_interrupted_runs_go_on_to_the_same_bits(options, tmp_path, monkeypatch, inside):
    # The file keeps what the clock has chosen, but the whole run is another one.
    inside(measure=first_wins, overhead=0.0)

    def asked(path, rank=2, progress=False):
        problem, queries, _, _ = world("images")
        op = inverse(build("ekfac") + 0.1 * Identity).lower(problem)
        return influence(op, queries, query_batch=2, query_rank=rank, checkpoint=path, progress=progress, **options)

    whole = asked(None)

    def until(bar, number):
        if bar.n + number >= 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.std.tqdm.update", until)
    part = asked(tmp_path / "scores", progress=True)
    assert part.partial and part.products == 4
    monkeypatch.undo()
    found = asked(tmp_path / "scores")
    assert not found.partial and found.products == 9
    save(whole, tmp_path / "result.safetensors")
    for other in (found, load(tmp_path / "result.safetensors"), asked(tmp_path / "scores")):
        for a, b in zip(every_tensor(other), every_tensor(whole), strict=True):
            assert torch.equal(a, b)
        assert other.error.rank == 2
    with pytest.raises(Exception, match="query_rank"):
        asked(tmp_path / "scores", rank=3)


def every_tensor(result):
    error = [*result.error.discarded.values(), *result.error.norms.values()]
    if result.topk is None:
        return [*tensors(result.scores), *error]
    return [
        result.topk.largest,
        result.topk.largest_samples,
        result.topk.smallest,
        result.topk.smallest_samples,
        *error,
    ]


class Tied(nn.Module):
    """A table that is a head too."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)

    def forward(self, words):
        return torch.tanh(self.mix(self.table(words))) @ self.table.weight.T


def test_what_has_no_layers_is_refused_with_a_cure():
    problem, queries, _, _ = world("dense")
    for matrix in ("gram", "dense", "cg"):
        op = MATRICES[matrix]().lower(problem)
        for ask in (influence, lambda *a, **k: next(influence_stream(*a, **k))):
            with pytest.raises(OptionError, match=r"query_rank= is for operators that act on layers .*'ekfac'"):
                ask(op, queries, query_rank=2)
    drawn = torch.randint(0, 7, (5, 6), generator=torch.Generator().manual_seed(0))
    tied = Problem(Tied().double(), MODELS["words"]()[1], (drawn[:, :-1], drawn[:, 1:]))
    with pytest.raises(
        OptionError, match=r"table\.weight: it is used in several ways at once .*Problem\(params=\.\.\.\)"
    ):
        influence((1.0 * Identity).lower(tied), query_rank=2)
    only = Problem(
        tied.model.given, MODELS["words"]()[1], (drawn[:, :-1], drawn[:, 1:]), params=["mix.weight", "mix.bias"]
    )
    assert influence((1.0 * Identity).lower(only), query_rank=2).scores.shape == (5, 5)


class Packed(nn.Module):
    """Two of the three matrices of a packed weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(random(6, 4))

    def forward(self, x):
        first, second, _ = self.weight.chunk(3)
        return x @ first.T + torch.tanh(x @ second.T)


def test_a_weight_that_is_used_in_part_is_refused():
    problem = Problem(Packed(), nn.CrossEntropyLoss(), (random(5, 4), torch.arange(5) % 2))
    with pytest.raises(OptionError, match="weight: only some of its numbers are used"):
        influence((1.0 * Identity).lower(problem), query_rank=1)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "2"])
def test_ranks_are_counts(rank):
    problem, queries, _, _ = world("dense")
    op = inverse(build("ekfac") + 0.1 * Identity).lower(problem)
    for ask in (influence, influence_stream):
        with pytest.raises(ExpressionError, match="query_rank to be an integer"):
            ask(op, queries, query_rank=rank)
    with pytest.raises(ExpressionError, match="query_rank= is for queries that are a Problem"):
        influence(op, problem.gradient(), query_rank=2)


def test_blocks_of_several_layers():
    problem, queries, G, V = world("dense")
    blocks = [
        Block(("4.weight", "2.bias"), Diagonal(random(32, seed=6).abs() + 1)),
        Block(("0.weight", "0.bias", "2.weight", "4.bias"), 2 * Identity),
    ]
    op = block_diagonal(blocks).lower(problem)
    close(influence(op, queries, query_rank=50).scores, V @ (op @ G.T))
    found = influence(op, queries, query_rank=1)
    assert bool(((found.scores - V @ (op @ G.T)).abs() <= found.error.bound() + 1e-12).all())


def test_single_precision():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
    problem, queries = (
        Problem(net, nn.CrossEntropyLoss(), (torch.randn(n, 20), torch.randint(3, (n,)))) for n in (50, 8)
    )
    op = inverse(build("ekfac") + 1e-2 * Identity).lower(problem)
    exact, found = influence(op, queries).scores, influence(op, queries, query_rank=3)
    assert bool(((found.scores - exact).abs() <= found.error.bound() + 1e-5 * exact.abs().max()).all())
    close_enough = influence(op, queries, query_rank=16).scores
    assert (close_enough - exact).norm() <= 1e-5 * exact.norm()
    assert estimate.RankError is type(found.error)
