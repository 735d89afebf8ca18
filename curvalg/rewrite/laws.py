"""The law book: every exact equality that curvalg uses, each with a numeric witness."""

from __future__ import annotations

from collections.abc import Sequence

from curvalg.expr import (
    BlockDiagonal,
    Identity,
    Inverse,
    Product,
    Restriction,
    Sum,
    block_diagonal,
    diagonal_part,
    inverse,
    multiply,
    restrict,
    sqrt,
    transpose,
)
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr
from curvalg.expr.terms import GGN, Fisher, Jacobian, LossHessian, MonteCarloFisher
from curvalg.rewrite.engine import Law
from curvalg.rewrite.rules import approximation_rules as parts
from curvalg.rewrite.rules import array_rules as leaves
from curvalg.rewrite.rules import block_rules as blocks
from curvalg.rewrite.rules import inverse_rules as inverses
from curvalg.rewrite.rules import partition_rules as partitions
from curvalg.rewrite.rules import restriction_rules as restrictions
from curvalg.rewrite.rules import root_rules as roots
from curvalg.rewrite.rules import term_rules as terms
from curvalg.rewrite.rules import transpose_rules as transposes
from curvalg.rewrite.witness import (
    COARSE,
    CROSSED,
    FINE,
    GROUPS,
    A,
    B,
    D,
    E,
    K,
    L,
    P,
    Q,
    R,
    S,
    U,
    V,
    X,
    Y,
)
from curvalg.rewrite.witness import blocks as made_of

J = Jacobian()
_NATURAL = LossFacts("a natural likelihood", convex=True, likelihood=True, fisher_is_ggn=True, classes=True)


def _gauss_newton() -> Sequence[Expr]:
    product = multiply(terms.GAUSS_NEWTON)
    return [product, 2 * A @ product @ S]


def _one_partition() -> Sequence[Expr]:
    some, others = block_diagonal({"a": A, "m.w": S}), block_diagonal({"m.w": B, "a": P})
    groups = [["b", "m.w"], ["a"]]
    return [
        2 * block_diagonal(A) - block_diagonal(B),
        block_diagonal(A, by=groups) / 2 + block_diagonal(B, by=groups),
        some - 2 * others,
        some - others + 3 * Identity,
        -FINE + J.T @ J,
        2 * COARSE + COARSE.transposed(transpose) / 3,
    ]


def _partitions() -> Sequence[Expr]:
    whole = made_of((["m.w", "b", "a", "m.b"], K + A))
    multiples = made_of(*(([name], c * Identity) for name, c in zip(GROUPS, (2, 2, 0, 5), strict=True)))
    split = made_of((["a"], S), (["m.w", "b"], A), (["m.b"], B))
    clash = made_of((["a"], S), (["b"], A), (["m.w", "m.b"], P))
    turned = made_of((["m.b", "m.w"], P), (["b", "a"], S @ B), joint=True)
    return [
        FINE + COARSE,
        COARSE + multiples,
        turned + COARSE,
        turned + CROSSED + multiples,
        CROSSED + FINE + 4 * Identity,
        multiples + COARSE + A,
        whole + multiples,
        whole + FINE,
        split + COARSE,
        COARSE + clash + FINE + made_of((["b", "a"], B), (["m.w"], A), (["m.b"], 2 * Identity)),
    ]


LAWS: tuple[Law, ...] = (
    # Transposes
    Law("transpose of a symmetric matrix", "S.T = S", transposes.of_symmetric, lambda: [S.T, GGN().T, sqrt(A).T]),
    Law("transpose of a sum", "(a*A + b*B + c*I).T = a*A.T + b*B.T + c*I", transposes.of(Sum), lambda: [(2 * A - B + 3 * Identity).T]),
    Law("transpose of a product", "(A @ B).T = B.T @ A.T", transposes.of(Product), lambda: [(A @ B).T, (A @ S @ B).T]),
    Law("transpose of an inverse", "inverse(A).T = inverse(A.T)", transposes.of(Inverse), lambda: [inverse(A).T]),
    Law("transpose of a sub-matrix", "restrict(A, p).T = restrict(A.T, p)", transposes.of(Restriction), lambda: [restrict(A, "a").T]),
    Law("transpose of blocks", "block_diagonal(A).T = block_diagonal(A.T)", transposes.of(BlockDiagonal), lambda: [block_diagonal(A).T, FINE.T]),
    Law("transpose of a Kronecker product", "(F ⊗ G).T = F.T ⊗ G.T", transposes.of_kronecker, lambda: [K.T, 2 * K.T @ A]),
    Law("transpose of low rank", "(L C R.T).T = R C.T L.T", transposes.of_low_rank, lambda: [R.T]),
    # Inverses
    Law("inverse of an inverse", "inverse(inverse(A)) = A", inverses.of_inverse, lambda: [inverse(inverse(A))]),
    Law("inverse of a multiple", "inverse(c*A) = inverse(A) / c", inverses.of_multiple, lambda: [inverse(-3 * A), inverse(4 * Identity) @ A]),
    Law("inverse of a product", "inverse(A @ B) = inverse(B) @ inverse(A)", inverses.of_product, lambda: [inverse(A @ B), inverse(A @ S @ inverse(2 * Identity) @ B)]),
    # Terms
    Law("Gauss-Newton", "jacobian.T @ loss_hessian @ jacobian = ggn", terms.gauss_newton, _gauss_newton),
    Law("Fisher of a natural likelihood", "fisher = ggn, fisher_mc = ggn_mc", terms.fisher_is_ggn, lambda: [Fisher(), MonteCarloFisher(2, 1)], _NATURAL),
    # Sub-matrices
    Law("sub-matrix of a sum", "restrict(a*A + c*I, p) = a*restrict(A, p) + c*restrict(I, p)", restrictions.of_sum, lambda: [restrict(2 * A - B / 3 + 5 * Identity, "a")]),
    Law(
        "sub-matrix through outputs",
        "restrict(jacobian.T @ X @ jacobian, p) = restrict(jacobian.T, p) @ X @ restrict(jacobian, p)",
        restrictions.of_product,
        lambda: [restrict(J.T @ J, "a"), restrict(LossHessian() @ J, "a")],
    ),
    Law("sub-matrix of a diagonal part", "restrict(diagonal_part(A), p) = diagonal_part(restrict(A, p))", restrictions.of_diagonal_part, lambda: [restrict(diagonal_part(A), ["m.w", "a"])]),
    # Square roots
    Law("square of a root", "sqrt(A) @ sqrt(A) = A", roots.squared, lambda: [sqrt(P) @ sqrt(P), A @ sqrt(P) @ sqrt(P) @ sqrt(P) @ B]),
    Law("root of blocks", "sqrt(block_diagonal({p: A})) = block_diagonal({p: sqrt(A)})", roots.of_blocks, lambda: [sqrt(block_diagonal({"a": P, "m.w": Q})), sqrt(made_of((["a", "m.w"], P), (["m.b", "b"], Q), joint=True))]),
    Law("root of a square number", "sqrt(r²*I) = r*I", roots.of_identity, lambda: [sqrt(2.25 * Identity) @ A, sqrt(A - A + 4 * Identity)]),
    # Diagonal parts
    Law("diagonal part of a sum", "diagonal_part(a*A + c*I) = a*diagonal_part(A) + c*I", parts.of_sum, lambda: [diagonal_part(2 * A - B + 3 * Identity), diagonal_part(A - A + 2 * Identity)]),
    Law("diagonal part of what is diagonal", "diagonal_part(D) = D", parts.of_diagonal, lambda: [diagonal_part(D), diagonal_part(diagonal_part(A))]),
    Law("diagonal part of a transpose", "diagonal_part(A.T) = diagonal_part(A)", parts.of_transpose, lambda: [diagonal_part(A.T)]),
    Law("diagonal part of blocks", "diagonal_part(block_diagonal(A)) = diagonal_part(A)", parts.of_blocks, lambda: [diagonal_part(block_diagonal(A, by="module")), diagonal_part(block_diagonal({"b": A, "a": B})), diagonal_part(COARSE)]),
    # Block-diagonals
    Law("nested blocks", "{p: {q: A, r: B}} = {q: A, r: B} where q and r are p", blocks.nested, lambda: [made_of((["m.w", "a", "b"], made_of((["a", "m.w"], A), (["b"], B), joint=True)), (["m.b"], S), joint=True)]),
    Law("blocks that are multiples", "{(p, q): c*I} = {p: c*I, q: c*I}", blocks.of_multiples, lambda: [CROSSED, block_diagonal({"a": A - A + 2 * Identity, "b": S})]),
    Law("blocks of one multiple", "{p: c*I, q: c*I} = c*I", blocks.of_one_multiple, lambda: [made_of((["a", "b"], 2 * Identity), (["m.w", "m.b"], 2 * Identity)), block_diagonal(A - A + 3 * Identity), block_diagonal({"a": A - A})]),
    Law("sum over one partition", "a*{p: A, q: B} + b*{p: C, q: D} = {p: a*A + b*C, q: a*B + b*D}", blocks.of_sum, _one_partition),
    Law("shift of blocks", "a*{p: A, q: B} + c*I = {p: a*A + c*I, q: a*B + c*I} where p and q are everything", blocks.of_shift, lambda: [2 * block_diagonal(A, by="module") - Identity, COARSE / 3 + 2 * Identity]),
    Law("product over one partition", "{p: A, q: B} @ {p: C, q: D} = {p: A @ C, q: B @ D}", blocks.of_product, lambda: [COARSE @ COARSE.T.simplify(), block_diagonal({"a": A, "b": B}) @ block_diagonal({"b": S, "a": B}) @ A]),
    Law("sum over different partitions", "{(p, q): A, r: B} + {p: C, (q, r): D} = {(p, q, r): {(p, q): A, r: B} + {p: C, (q, r): D}}", partitions.of_sum, _partitions),
    # Array leaves
    Law("sum of diagonals", "a*diag(u) + b*diag(v) = diag(a*u + b*v)", leaves.sum_of_diagonals, lambda: [2 * D - E / 3 + Identity, -E + A]),
    Law("product of diagonals", "diag(u) @ diag(v) = diag(u v)", leaves.product_of_diagonals, lambda: [D @ E, A @ D @ E @ D @ B]),
    Law("product of Kronecker products", "(F ⊗ G) @ (H ⊗ I) = (F @ H) ⊗ (G @ I)", leaves.product_of_kroneckers, lambda: [K @ L, A @ L @ K @ K @ B]),
    Law("sum in one eigenbasis", "a*Q diag(u) Q.T + b*Q diag(v) Q.T + c*I = Q diag(a*u + b*v + c) Q.T", leaves.sum_of_eigenbases, lambda: [2 * U - V / 3 + 3 * Identity, X + Y - U + A + Identity, -X, U - Identity]),
    Law("product in one eigenbasis", "Q diag(u) Q.T @ Q diag(v) Q.T = Q diag(u v) Q.T", leaves.product_of_eigenbases, lambda: [U @ V @ U, A @ X @ Y @ U]),
)  # fmt: skip
"""All laws, in the order in which they are tried."""

__all__ = ["LAWS", "A", "B", "S"]
