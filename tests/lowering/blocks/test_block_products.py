"""Block-diagonal products: from kept layer inputs and deltas where the matrix has them, block by block otherwise."""

from __future__ import annotations

import pytest
import torch

from curvalg import Identity, block_diagonal, registry

SUMS = {
    "ggn": (lambda b: b("ggn"), lambda d: d.ggn),
    "covariance": (lambda b: b("covariance"), lambda d: d.covariance),
    "centred": (lambda b: b("centered_covariance"), lambda d: d.centered_covariance),
    "signed sum": (
        lambda b: 2 * b("ggn") - b("centered_covariance") / 3 + b("covariance"),
        lambda d: 2 * d.ggn - d.centered_covariance / 3 + d.covariance,
    ),
    "hessian": (lambda b: b("hessian"), lambda d: d.hessian),
    "mixed": (lambda b: b("hessian") + b("ggn"), lambda d: d.hessian + d.ggn),
}
CASES = [
    "mlp",
    "cnn",
    "tied_embedding",
    "reused_weight",
    "inplace_activation",
    "encoder_layer",
    "lstm",
    "batchnorm_eval",
]


def mask(dense, by):
    """1 where two parameters share a block."""
    if isinstance(by, str):
        keys = [n if by == "parameter" else n.rpartition(".")[0] for n in dense.names]
    else:
        keys = [next((i for i, group in enumerate(by) if n in group), n) for n in dense.names]
    owner = [key for key, shape in zip(keys, dense.shapes, strict=True) for _ in range(shape.numel())]
    covered = [isinstance(by, str) or not isinstance(key, str) for key in owner]
    return torch.tensor([[float(a == b and ok) for b in owner] for a, ok in zip(owner, covered, strict=True)]).double()


@pytest.mark.parametrize("by", ["module", "parameter"])
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("case", CASES)
def test_blocks_equal_the_masked_matrix(case, name, by, problem_of, dense_of, vectors, take_way):
    take_way("factored")  # whichever is faster is taken; here the numbers of this one are wanted
    dense, problem = dense_of(case), problem_of(case)
    make, reference = SUMS[name]
    A, V = reference(dense) * mask(dense, by), vectors(dense.D)
    for op in (
        block_diagonal(make(registry.build), by=by).lower(problem),
        block_diagonal(make(registry.build), by=by).lower(problem_of(case, cache=0)),
    ):
        for _ in range(2):
            got = op @ V
            assert (got - A @ V).norm() <= 1e-10 * (A @ V).norm()
        assert torch.allclose(op @ V[:, 0], got[:, 0], atol=1e-12)
    shifted = (block_diagonal(make(registry.build), by=by) + 0.5 * Identity).lower(problem)
    assert (shifted @ V - A @ V - 0.5 * V).norm() <= 1e-10 * V.norm()


def test_groups_and_parts(problem_of, dense_of, vectors, take_way):
    take_way("factored")
    dense, problem, V = dense_of("mlp"), problem_of("mlp"), vectors(dense_of("mlp").D)
    groups = [["0.weight", "2.bias"], ["0.bias"]]
    op = block_diagonal(registry.build("ggn"), by=groups).lower(problem)
    A = dense.ggn * mask(dense, groups)
    assert torch.allclose(op @ V, A @ V, atol=1e-12)
    assert "factored" in op.explain()


def test_explain_tells_which_way_and_at_what_cost(problem_of):
    problem = problem_of("mlp")
    factored = block_diagonal(registry.build("ggn"), by="module").lower(problem)
    assert "2 diagonal blocks of ggn, factored" in factored.explain()
    ordinary = block_diagonal(registry.build("hessian")).lower(problem)
    assert "4 diagonal blocks, one after the other; about 4 passes a product" in ordinary.explain()
    fresh = block_diagonal(registry.build("ggn"), by="module").lower(problem_of("mlp", cache=0))
    assert "2 diagonal blocks, one after the other" in fresh.explain()


@pytest.mark.parametrize("slower", [False, True])
def test_the_faster_way_is_taken_and_told(slower, problem_of, dense_of, vectors, take_way):
    take_way("ordinary" if slower else "factored")
    dense, problem = dense_of("cnn"), problem_of("cnn")
    op = block_diagonal(registry.build("covariance"), by="module").lower(problem)
    V = vectors(dense.D)
    A = dense.covariance * mask(dense, "module")
    for _ in range(3):
        assert torch.allclose(op @ V, A @ V, atol=1e-12)
    report = op.explain()
    assert ("one after the other; about" in report) == slower
    assert "measured, several columns: ordinary" in report


def test_a_budget_that_does_not_suffice(problem_of, dense_of, vectors):
    dense, problem = dense_of("cnn"), problem_of("cnn", cache=2000)
    op = block_diagonal(registry.build("covariance"), by="module").lower(problem)
    V = vectors(dense.D)
    A = dense.covariance * mask(dense, "module")
    for _ in range(2):
        assert torch.allclose(op @ V, A @ V, atol=1e-12)
    assert "one after the other" in op.explain()


def test_factored_products_call_no_model_once_kept(counted_model, vectors):
    problem, calls = counted_model("mlp")
    op = block_diagonal(registry.build("ggn")).lower(problem)
    V = vectors(problem.size)
    op @ V
    before = calls()
    op @ V
    assert calls() == before
