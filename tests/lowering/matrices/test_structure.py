"""Structured matrices: every result equals that of the dense matrix, whatever the order, sign and scale of the operands."""

from __future__ import annotations

import pytest
import torch

from curvalg import (
    Block,
    Diagonal,
    Eigenbasis,
    ExpressionError,
    FactsError,
    Identity,
    Kronecker,
    LowRank,
    block_diagonal,
    diagonal_part,
    inv_sqrt,
    inverse,
    registry,
    restrict,
    sqrt,
)
from tests.support.structures import (
    STRUCTURED,
    JointKronecker,
    diagonal,
    joint_kronecker,
    joint_positions,
    kronecker,
    low_rank,
    offsets,
    psd,
    random,
)

GGN = registry.build("ggn")
SHIFT = 0.7
WRITTEN = {
    "A + cI": lambda a: a + SHIFT * Identity,
    "cI + A": lambda a: SHIFT * Identity + a,
    "2A/2 + cI": lambda a: 2 * a / 2 + SHIFT * Identity,
    "-(-cI - A)": lambda a: -(-SHIFT * Identity - a),
    "A - (-c)I": lambda a: a - (-SHIFT) * Identity,
    "(A/4 + cI/4) * 4": lambda a: (a / 4 + SHIFT / 4 * Identity) * 4,
}


@pytest.fixture
def problem(problem_of):
    # As few rows as leave fewer columns than parameters, so that the dual form is open.
    return problem_of("mlp")


@pytest.fixture
def dense(dense_of):
    return dense_of("mlp")


def eye(n):
    return torch.eye(n).double()


def close(got, expected, tolerance=1e-9):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert (torch.as_tensor(got, dtype=torch.float64) - expected).norm() <= tolerance * max(1.0, float(expected.norm()))


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("name", STRUCTURED)
def test_products_and_inverses_equal_the_dense_ones(name, written, problem, dense, vectors):
    make, form = STRUCTURED[name]
    expr, matrix = make(dense)
    damped, A = WRITTEN[written](expr), matrix + SHIFT * eye(dense.D)
    V = vectors(dense.D)
    close(damped.lower(problem) @ V, A @ V)
    op = inverse(damped).lower(problem)
    close(op @ V, torch.linalg.solve(A, V))
    assert f"{form}: chosen" in op.explain(), op.explain()
    close((-3 * inverse(damped)).lower(problem) @ V, -3 * torch.linalg.solve(A, V))
    close(inverse(-damped / 2).lower(problem) @ V, torch.linalg.solve(-A / 2, V))
    assert int(op.last_solve.iterations.max()) == 0
    assert op.last_solve.ok


@pytest.mark.parametrize("name", [n for n in STRUCTURED if n not in ("kronecker", "low rank on a diagonal")])
def test_square_roots_equal_the_dense_ones(name, problem, dense, vectors):
    make, _ = STRUCTURED[name]
    expr, matrix = make(dense)
    shift = SHIFT + (100 if name == "low rank" else 0)
    A = matrix + shift * eye(dense.D)
    values, Q = torch.linalg.eigh(A)
    root = Q @ torch.diag(values.sqrt()) @ Q.T
    V = vectors(dense.D)
    damped = expr + shift * Identity
    close(sqrt(damped).lower(problem) @ V, root @ V)
    close(inv_sqrt(damped).lower(problem) @ V, torch.linalg.solve(root, V))
    close((sqrt(damped) @ sqrt(damped)).lower(problem) @ V, A @ V)
    close(inverse(2 * sqrt(damped) + Identity).lower(problem) @ V, torch.linalg.solve(2 * root + eye(dense.D), V))


@pytest.mark.parametrize("damping", [0.0, SHIFT])
@pytest.mark.parametrize("name", STRUCTURED)
def test_exact_quantities(name, damping, problem, dense):
    make, _ = STRUCTURED[name]
    expr, matrix = make(dense)
    A = matrix + damping * eye(dense.D)
    op = (
        (-2 * (expr + damping * Identity)).lower(problem)
        if name == "kronecker"
        else (expr + damping * Identity).lower(problem)
    )
    A = -2 * A if name == "kronecker" else A
    close(op.exact("trace"), A.trace())
    close(op.exact("diagonal"), A.diagonal())
    if damping:
        close(op.exact("logdet"), torch.linalg.slogdet(A).logabsdet)
    pairs = op.exact("eigh")
    if name == "low rank on a diagonal":
        assert pairs is None
        return
    everything = (
        torch.cat([pairs.eigenvalues, torch.full((pairs.multiplicity,), pairs.rest, dtype=torch.float64)]).sort().values
    )
    close(everything, torch.linalg.eigvalsh(A), 1e-8)
    chosen = pairs.vectors(slice(-3, None))
    close(chosen.T @ chosen, eye(3), 1e-7)
    close(A @ chosen, chosen * pairs.eigenvalues[-3:], 1e-7)


def test_quantities_of_inverses_and_roots(problem, dense):
    A = dense.ggn + SHIFT * eye(dense.D)
    inside = GGN + SHIFT * Identity
    for op, B in (
        (inverse(inside).lower(problem), torch.linalg.inv(A)),
        ((2 * inverse(inside) + Identity).lower(problem), 2 * torch.linalg.inv(A) + eye(dense.D)),
    ):
        close(op.exact("trace"), B.trace())
        close(op.exact("logdet"), torch.linalg.slogdet(B).logabsdet)
        close(op.exact("diagonal"), B.diagonal())
    root = sqrt(inside).lower(problem)
    close(root.exact("trace"), torch.linalg.eigvalsh(A).sqrt().sum())
    a, B = low_rank(dense), diagonal(dense)
    updated = inverse(a[0] + B[0]).lower(problem)
    close(updated.exact("logdet"), -torch.linalg.slogdet(a[1] + B[1]).logabsdet)
    assert registry.build("jacobian").lower(problem).exact("trace") is None
    with pytest.raises(ExpressionError, match="trace, diagonal, logdet, eigh"):
        root.exact("rank")


def test_unsymmetric_kronecker_factors(problem, dense, vectors):
    b = random(dense.D, dense.D, seed=3)
    op = inverse(2 * Kronecker(torch.full((1, 1), 3.0).double(), b)).lower(problem)
    V = vectors(dense.D)
    close(op @ V, torch.linalg.solve(6 * b, V))
    assert "kronecker: chosen, LU" in op.explain()
    damped = inverse(Kronecker(b) + SHIFT * Identity).lower(problem)
    close(damped @ V, torch.linalg.solve(b + SHIFT * eye(dense.D), V))
    assert "kronecker: declined, its factors are not symmetric" in damped.explain()


def test_low_rank_updates_of_every_base(problem, dense, vectors):
    (update, U), V = low_rank(dense), vectors(dense.D)
    skew = LowRank(random(dense.D, 2), torch.tensor([1.0, 0.0]).double(), random(dense.D, 2, seed=9))
    W = skew.left @ torch.diag(skew.core) @ skew.right.T
    bases = {"kronecker": kronecker, "diagonal": diagonal, "blocks": lambda d: (JointKronecker(), joint_kronecker(d))}
    for base in bases.values():
        expr, B = base(dense)
        A = U + W / 3 + B + SHIFT * eye(dense.D)
        op = inverse(update + skew / 3 + expr + SHIFT * Identity).lower(problem)
        close(op @ V, torch.linalg.solve(A, V))
        assert "woodbury: chosen" in op.explain()
        close(op.exact("logdet"), -torch.linalg.slogdet(A).logabsdet)
    op = inverse(update + GGN + SHIFT * Identity).lower(problem)
    close(op @ V, torch.linalg.solve(U + dense.ggn + SHIFT * eye(dense.D), V))
    assert "solved by gram" in op.explain()


def test_a_kronecker_approximation_damped_by_layer_stays_exact(problem, dense, vectors):
    table = offsets(dense)
    damping = torch.full((dense.D,), 0.3, dtype=torch.float64)
    for name, (at, shape) in table.items():
        if name.startswith("0."):
            damping[at : at + torch.Size(shape).numel()] = 0.1
    per_layer = block_diagonal({"0.*": 0.1 * Identity, "[!0].*": 0.3 * Identity})
    V, A = vectors(dense.D), joint_kronecker(dense) + torch.diag(damping)
    for expr in (
        JointKronecker() + per_layer,
        per_layer + JointKronecker(),
        2 * (JointKronecker() / 2 + per_layer / 2),
    ):
        close(expr.lower(problem) @ V, A @ V)
        op = inverse(expr).lower(problem)
        close(op @ V, torch.linalg.solve(A, V))
        assert "by kronecker" in op.explain()
        close(op.exact("logdet"), -torch.linalg.slogdet(A).logabsdet)
        close(inv_sqrt(expr).lower(problem) @ (inv_sqrt(expr).lower(problem) @ V), torch.linalg.solve(A, V))


def test_blocks_that_leave_parameters_out(problem, dense, vectors):
    expr = block_diagonal({"0.*": GGN + Identity})
    with pytest.raises(FactsError, match=r"leave out .*2\.weight"):
        inverse(expr).lower(problem)
    names = [n for n in dense.names if n.startswith("0.")]
    size = sum(s.numel() for n, s in zip(dense.names, dense.shapes, strict=True) if n in names)
    A = torch.zeros_like(dense.ggn)
    A[:size, :size] = dense.ggn[:size, :size] + eye(size)
    A = A + 2 * eye(dense.D)
    V = vectors(dense.D)
    close((expr + 2 * Identity).lower(problem) @ V, A @ V)
    close(inverse(expr + 2 * Identity).lower(problem) @ V, torch.linalg.solve(A, V))


def test_joint_blocks_are_checked(problem, dense):
    with pytest.raises(ExpressionError, match="a weight"):
        block_diagonal([Block(("0.bias", "0.weight"), Kronecker(psd(25)), joint=True)]).lower(problem)


def test_joint_blocks_hold_terms_and_blocks_too(problem, dense):
    """What lies by name is the same matrix in any layout; arrays beside it lie as [W | b]."""
    layer = ("0.weight", "0.bias")
    n = sum(s.numel() for name, s in zip(dense.names, dense.shapes, strict=True) if name in layer)
    weight = next(s.numel() for name, s in zip(dense.names, dense.shapes, strict=True) if name == layer[0])
    kronecker = Kronecker(psd(5, 1), psd(5, 2))
    inner = block_diagonal({"0.weight": 2 * Identity, "0.bias": 5 * Identity})
    expr = block_diagonal([Block(layer, GGN + 3 * kronecker @ inner + inverse(kronecker + inner), joint=True)])
    table = offsets(dense)
    order = torch.tensor(joint_positions(table, *layer)).argsort()
    K = torch.kron(psd(5, 1), psd(5, 2))[order][:, order]
    D = torch.cat([torch.full((weight,), 2.0), torch.full((n - weight,), 5.0)]).double().diag()
    expected = torch.zeros_like(dense.ggn)
    expected[:n, :n] = dense.ggn[:n, :n] + 3 * K @ D + torch.linalg.inv(K + D)
    close(expr.lower(problem).to_dense(), expected)


def test_blocks_of_sub_matrices(problem, dense, vectors):
    """A restricted expression in a block is a sub-matrix of the whole, not a matrix of the block's parameters."""
    V = vectors(dense.D)
    expr = block_diagonal(inverse(GGN + Identity), by="module")
    B = torch.linalg.inv(dense.ggn + eye(dense.D))
    expected = torch.zeros_like(B)
    at = 0
    for group in {n.rpartition(".")[0] for n in dense.names}:
        index = torch.cat(
            [
                torch.arange(o, o + torch.Size(s).numel())
                for n, (o, s) in offsets(dense).items()
                if n.rpartition(".")[0] == group
            ]
        )
        expected[index[:, None], index[None]] = B[index[:, None], index[None]]
        at += len(index)
    assert at == dense.D
    close(expr.lower(problem) @ V, expected @ V)
    close(inverse(expr).lower(problem) @ V, torch.linalg.solve(expected, V))


def test_restricted_matrices_take_structured_forms(problem, dense, vectors):
    index = torch.cat(
        [torch.arange(o, o + torch.Size(s).numel()) for n, (o, s) in offsets(dense).items() if n.startswith("0.")]
    )
    A = dense.covariance[index[:, None], index[None]] + SHIFT * eye(len(index))
    op = inverse(restrict(registry.build("covariance"), "0.*") + SHIFT * Identity).lower(problem)
    V = vectors(len(index))
    close(op @ V, torch.linalg.solve(A, V))
    assert "gram: chosen" in op.explain()
    kfac = inverse(restrict(JointKronecker(), "0.*") + SHIFT * Identity).lower(problem)
    K = joint_kronecker(dense)[index[:, None], index[None]] + SHIFT * eye(len(index))
    close(kfac @ V, torch.linalg.solve(K, V))
    assert "blocks: chosen" in kfac.explain()


@pytest.mark.parametrize("name", ["hessian", "ggn", "covariance", "centered_covariance", "residual"])
def test_diagonal_parts(name, problem, dense, vectors):
    A = dense.matrix(name)
    expr = diagonal_part(3 * registry.build(name) + 2 * Identity)
    V = vectors(dense.D)
    close(expr.lower(problem) @ V, (3 * A.diagonal() + 2)[:, None] * V)
    close(
        diagonal_part(restrict(registry.build(name), "0.*")).lower(problem).exact("diagonal"),
        A.diagonal()[: expr.lower(problem).problem.restricted(["0.*"]).size],
    )
    close(inverse(diagonal_part(GGN) + Identity).lower(problem) @ V, V / (dense.ggn.diagonal() + 1)[:, None])


def test_singular_matrices_are_named(problem, dense):
    zero = Diagonal(torch.zeros(dense.D).double())
    for expr in (
        zero,
        Eigenbasis(torch.eye(dense.D).double(), torch.zeros(dense.D).double()),
        Kronecker(psd(1), 0 * psd(dense.D)),
    ):
        with pytest.raises(FactsError, match=r"zero to working precision; add damping, c \* Identity"):
            inverse(expr).lower(problem) @ torch.ones(dense.D).double()
    with pytest.raises(FactsError, match="no real square root"):
        sqrt(kronecker(dense)[0]).lower(problem) @ torch.ones(dense.D).double()


def test_roots_of_what_has_fast_solves_only_are_dense_while_that_is_possible(problem, dense, inside):
    (a, A), (b, B) = low_rank(dense), diagonal(dense)
    root = sqrt(a.T @ a + b).lower(problem).to_dense()
    close(root @ root, A.T @ A + B)
    inside(dense_limit=10)
    with pytest.raises(FactsError, match="no exact form"):
        sqrt(a + b).lower(problem)


@pytest.mark.parametrize("case", ["mlp", "sequence_classes_second", "several_outputs", "linear"])
def test_output_space_against_dense(case, problem_of, dense_of, vectors):
    """The factors of the Gauss-Newton law by themselves, and products that no law touches."""
    problem, dense = problem_of(case), dense_of(case)
    J, B = registry.build("jacobian"), registry.build("loss_hessian")
    j, b = dense.jacobian, dense.loss_hessian
    outputs = eye(len(b))
    table = {
        J: j,
        J.T: j.T,
        B: b,
        J @ J.T: j @ j.T,
        B @ J: b @ j,
        J.T @ (B + 0.1 * Identity) @ J: j.T @ (b + 0.1 * outputs) @ j,
        (J @ J.T) ** 2 - 2 * B: j @ j.T @ j @ j.T - 2 * b,
        J @ inverse(J.T @ J + Identity) @ J.T: j @ torch.linalg.inv(j.T @ j + eye(dense.D)) @ j.T,
        inverse(J @ J.T + Identity): torch.linalg.inv(j @ j.T + outputs),
        restrict(J, dense.names[0]): j[:, : dense.shapes[0].numel()],
    }
    for expr, matrix in table.items():
        V = vectors(matrix.shape[1])
        close(expr.lower(problem) @ V, matrix @ V)
    assert (J.T @ B @ J).lower(problem).explain().count("sweep: ggn") == 1
