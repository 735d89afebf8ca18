"""KFAC, EKFAC and FOOF: exact where theory says so, equal to the peer where definitions coincide, structured always."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from curvalg import (
    CurvalgError,
    Identity,
    Problem,
    ProblemError,
    block_diagonal,
    inv_sqrt,
    inverse,
    parse,
    registry,
    restrict,
)
from curvalg_plugins.kronecker import factors

build = registry.build


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deep_linear(loss=None, batches=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2, bias=False)).double()
    X, y = random(9, 5), random(9, 2, seed=1)
    data = [(X[:4], y[:4]), (X[4:], y[4:])] if batches == 2 else [(X, y)]
    return Problem(model, loss or nn.MSELoss(), data)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.MSELoss(reduction="sum")])
def test_deep_linear_networks_with_squared_loss_are_exact(loss, joint, approximation):
    problem = deep_linear(loss)
    for name in ("kfac", "ekfac"):
        got = build(name, joint=joint, approximation=approximation).lower(problem).to_dense()
        exact = block_diagonal(build("ggn"), by="module" if joint else "parameter").lower(problem).to_dense()
        assert (got - exact).norm() <= 1e-10 * exact.norm()


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("case", ["mlp", "cnn", "sequence_classes_last", "tied_embedding"])
def test_the_corrected_eigenvalues_are_nearer(case, fisher, problem_of):
    problem = problem_of(case)
    term = {"exact": build("ggn"), "mc": build("ggn_mc"), "empirical": build("covariance")}[fisher]
    exact = block_diagonal(term, by="module").lower(problem).to_dense()
    options = {"fisher": fisher, "rest": "exact"}
    error = {k: (build(k, **options).lower(problem).to_dense() - exact).norm() for k in ("kfac", "ekfac")}
    assert error["ekfac"] < error["kfac"] < exact.norm()


@pytest.mark.parametrize("case", ["mlp", "cnn"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_agrees_with_curvlinops(approximation, case, problem_of, vectors):
    """The peer divides by the data like we do: the same matrix, without any factor."""
    from curvlinops import EKFACLinearOperator, KFACLinearOperator

    problem = problem_of(case, data=[_whole(case)])
    model = problem.model.module
    X, y = _whole(case)
    V = vectors(problem.size, 2)
    for ours, theirs in (("kfac", KFACLinearOperator), ("ekfac", EKFACLinearOperator)):
        for fisher, kind in (("exact", "type-2"), ("empirical", "empirical")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peer = theirs(
                    model,
                    nn.CrossEntropyLoss(),
                    list(model.parameters()),
                    [(X, y)],
                    fisher_type=kind,
                    kfac_approx=approximation,
                    separate_weight_and_bias=False,
                    check_deterministic=False,
                )
                expected = peer @ V
            got = build(ours, fisher=fisher, approximation=approximation).lower(problem) @ V
            # The eigenvectors of nearly equal eigenvalues are free, and EKFAC depends on them.
            assert (got - expected).norm() <= (1e-10 if ours == "kfac" else 1e-5) * expected.norm()


def test_agrees_with_backpack():
    """Its KFLR is kfac(fisher='exact') with weight and bias apart, without any factor."""
    from backpack import backpack, extend
    from backpack.extensions import KFLR

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, y = random(8, 5), torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
    K = build("kfac", joint=False).lower(Problem(model, nn.CrossEntropyLoss(), (X, y))).to_dense()
    twin, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())
    with backpack(KFLR()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss(twin(X), y).backward()
    blocks = [torch.kron(*p.kflr) if len(p.kflr) == 2 else p.kflr[0] for p in twin.parameters()]
    assert torch.allclose(K, torch.block_diag(*blocks), rtol=1e-10, atol=1e-14)


def test_a_wide_gram_matrix_is_made_of_panels():
    for width in (1, factors.WIDE - 1, factors.WIDE, 301):
        x = random(7, width)
        got = factors.gram(x)
        assert torch.allclose(got, x.T @ x, rtol=1e-12, atol=1e-12)
        assert torch.equal(got, got.T)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(("columns", "positions"), [(1, 1), (2, 3), (1, 9)])
def test_second_moments_in_either_order(columns, positions, joint, inside):
    inside(kronecker_chunk=2 * columns * 3 * 5)  # two rows at a time
    h, d = random(5, positions, 4), random(columns, 5, positions, 3, seed=1)
    output = torch.linalg.qr(random(3, 3, seed=2))[0]
    inputs = torch.linalg.qr(random(4 + joint, 4 + joint, seed=3))[0]
    one = torch.cat([h, h.new_ones(*h.shape[:-1], 1)], -1) if joint else h
    gradients = torch.einsum("knto,nti->knoi", d, one)
    expected = (output.T @ gradients @ inputs).square().sum((0, 1))
    assert torch.allclose(factors.second_moments(h, d, output, inputs), expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "foof"])
def test_a_sub_matrix_of_whole_layers_keeps_its_exact_inverse(name, problem_of):
    problem = problem_of("mlp")
    A = (build(name) + 0.1 * Identity).lower(problem).to_dense()
    layers = [layer for layer in ("0.*", "2.*") if any(n.startswith(layer[0]) for n in problem.layout.names)]
    for expr, layer in ((restrict(build(name), layer), layer) for layer in layers):
        op = inverse(expr + 0.1 * Identity).lower(problem)
        slices = [s for n, s in problem.layout.slices.items() if n.startswith(layer[0])]
        at = torch.cat([torch.arange(s.start, s.stop) for s in slices])
        assert torch.allclose(op.to_dense(), torch.linalg.inv(A[at][:, at]), atol=1e-9)
        assert "inverse by blocks" in op.explain() and "chosen, 1 blocks" in op.explain()
    blocks = inverse(block_diagonal(build(name), by="module") + 0.1 * Identity).lower(problem)
    assert torch.allclose(blocks.to_dense(), torch.linalg.inv(A), atol=1e-9)
    assert "dense: chosen" not in blocks.explain()


def test_what_a_term_declares_outlives_its_arrays(problem_of):
    op = (build("kfac") + 0.1 * Identity).lower(problem_of("mlp")).prepare()
    assert op.facts.positive_definite is True


def test_one_call_of_the_model_for_each_batch(problem_of):
    problem, calls = problem_of("mlp", verify=False), 0

    def count(*_):
        nonlocal calls
        calls += 1

    problem.model.module.register_forward_hook(count)
    problem.value()
    build("kfac").lower(problem).prepare()  # checks the layers
    before = calls
    build("kfac", joint=False).lower(problem).prepare()
    assert calls - before == len(list(problem.data.source))


def _whole(case):
    from tests.support.zoo import make

    batches = make(case).batches
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.mark.parametrize("case", ["mlp", "cnn", "sequence_classes_second"])
@pytest.mark.parametrize("name", ["kfac", "ekfac", "foof"])
def test_batches_do_not_matter(name, case, problem_of):
    whole = problem_of(case, data=[_whole(case)])
    ragged = problem_of(case)
    a, b = (build(name, rest="diagonal").lower(p).to_dense() for p in (whole, ragged))
    assert (a - b).norm() <= 1e-9 * a.norm()


@pytest.mark.parametrize("name", ["kfac", "ekfac", "foof"])
def test_damped_inverses_and_roots_are_exact(name, problem_of, vectors):
    problem = problem_of("cnn")
    expr = build(name) + 0.1 * Identity
    A, V = expr.lower(problem).to_dense(), vectors(problem.size)
    op = inverse(expr).lower(problem)
    assert torch.allclose(op @ V, torch.linalg.solve(A, V), atol=1e-9)
    assert int(op.last_solve.iterations.max()) == 0
    half = inv_sqrt(expr).lower(problem)
    assert torch.allclose(half @ (half @ V), torch.linalg.solve(A, V), atol=1e-9)
    assert abs(expr.lower(problem).exact("logdet") - torch.linalg.slogdet(A).logabsdet) <= 1e-8
    assert abs(expr.lower(problem).exact("trace") - A.trace()) <= 1e-9
    per_layer = inverse(build(name) + block_diagonal({"0.*": 0.2 * Identity, "[!0]*": 0.1 * Identity})).lower(problem)
    damped = A - 0.1 * torch.eye(problem.size).double() + torch.diag(_damping(problem))
    assert torch.allclose(per_layer @ V, torch.linalg.solve(damped, V), atol=1e-9)
    assert int(per_layer.last_solve.iterations.max()) == 0


def _damping(problem):
    """0.2 on the first layer, 0.1 elsewhere."""
    slices = problem.layout.slices.items()
    return torch.cat(
        [torch.full((s.stop - s.start,), 0.2 if n.startswith("0.") else 0.1, dtype=torch.float64) for n, s in slices]
    )


def test_factored_damping_is_another_matrix(problem_of):
    problem = problem_of("mlp")
    plain, c = build("kfac").lower(problem).to_dense(), 0.01
    factored = build("kfac", factored_damping=c).lower(problem).to_dense()
    damped = (build("kfac") + c * Identity).lower(problem).to_dense()
    eye = torch.eye(problem.size).double()
    assert torch.allclose(damped, plain + c * eye, atol=1e-12)
    assert (factored - damped).norm() > 1e-3 * damped.norm()
    # (B + √c/π I) ⊗ (A + π √c I) = B ⊗ A + c I + two cross terms, which are positive.
    assert torch.linalg.eigvalsh(factored - damped)[0] >= -1e-12


def test_ignored_rows_do_not_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = random(6, 4), torch.tensor([0, 1, 2, -100, 1, -100])
    some = y != -100
    a = build("kfac").lower(Problem(model, nn.CrossEntropyLoss(), (X, y))).to_dense()
    b = build("kfac").lower(Problem(model, nn.CrossEntropyLoss(), (X[some], y[some]))).to_dense()
    assert (a - b).norm() <= 1e-12 * b.norm()


def test_what_has_no_factors_is_named_or_gets_a_block(problem_of):
    problem = problem_of("encoder_layer")
    with pytest.raises(ProblemError, match=r"no Kronecker factors for .*norm1\.weight .*no matrix.*rest='diagonal'"):
        build("kfac", rest="refuse").lower(problem).to_dense()
    exact = block_diagonal(build("ggn")).lower(problem)
    K = build("kfac", rest="exact").lower(problem).to_dense()
    at = problem.layout.slices["0.norm1.weight"]
    G = exact.to_dense()
    assert torch.allclose(K[at, at], G[at, at], atol=1e-12)
    D = build("kfac", rest="diagonal").lower(problem).to_dense()
    assert torch.allclose(D[at, at], torch.diag(G[at, at].diagonal()), atol=1e-12)


def test_options_are_checked_and_printed():
    assert str(build("kfac", fisher="mc", samples=2)) == "kfac(fisher='mc', samples=2)"
    assert parse("ekfac(approximation='reduce')") == build("ekfac", approximation="reduce")
    for options in ({"fisher": "type-2"}, {"approximation": "sum"}, {"rest": "zero"}, {"factored_damping": -1.0}):
        with pytest.raises(CurvalgError):
            build("kfac", **options)


def test_a_wrong_choice_is_answered_with_the_choices():
    with pytest.raises(
        CurvalgError, match=r"option 'fisher' must be Literal\['exact', 'mc', 'empirical'\], got 'type-2'"
    ):
        build("kfac", fisher="type-2")


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "mc", "samples": 0}, "samples is an integer ≥ 1, got 0"),
        ({"fisher": "mc", "seed": -1}, "seed is an integer ≥ 0, got -1"),
        ({"samples": 5}, "samples is for fisher='mc', got samples=5 with fisher='exact'"),
        ({"fisher": "empirical", "seed": 3}, "seed is for fisher='mc'"),
    ],
)
def test_draws_are_for_draws(name, options, message):
    with pytest.raises(CurvalgError, match=message):
        build(name, **options)


@pytest.mark.parametrize("positions", [2, 9])
def test_second_moments_where_deltas_are_rotated_first_or_last(positions):
    torch.manual_seed(0)
    h, d = torch.randn(4, positions, 5).double(), torch.randn(2, 4, positions, 3).double()
    output, inputs = (torch.linalg.qr(torch.randn(n, n).double())[0] for n in (3, 5))
    gradients = torch.einsum("knto,nti->knoi", d, h)
    for basis, given in ((inputs, inputs), (torch.eye(5).double(), None)):
        expected = (output.T @ gradients @ basis).square().sum((0, 1))
        assert torch.allclose(factors.second_moments(h, d, output, given), expected, rtol=1e-10)


def test_a_table_has_unit_vectors_for_its_inputs_without_an_eigenproblem(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    problem = Problem(model, nn.CrossEntropyLoss(), (torch.randint(0, 7, (9, 3)), torch.randint(0, 3, (9,))))
    solved, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: solved.append(a.shape[-1]) or eigh(a))
    ekfac = registry.build("ekfac").lower(problem).to_dense()
    assert 7 not in solved
    monkeypatch.setattr(factors, "is_diagonal", lambda _: False)
    problem = Problem(model, nn.CrossEntropyLoss(), problem.data.source)
    assert torch.allclose(
        torch.as_tensor(registry.build("ekfac").lower(problem).to_dense()), torch.as_tensor(ekfac), atol=1e-6
    )
    assert 7 in solved


def test_a_rehearsal_is_not_compared(inside):
    """One row says nothing about which rows gradients belong to: the batch says it, once."""
    rows, compare = [], inside["compare_layers"]
    inside(compare_layers=lambda recorded, names: rows.append(len(recorded.z)) or compare(recorded, names))
    torch.manual_seed(0)
    problem = Problem(nn.Linear(3, 2), nn.MSELoss(), (torch.randn(6, 3), torch.randn(6, 2)))
    registry.build("kfac").lower(problem).prepare()
    assert 1 not in rows and rows
