"""The law book: every exact equality that curvalg uses, each with numeric witnesses.

Witnesses are made of stand-in matrices, attributes of w; tests and the documentation hand them in
(``tests/support/witness.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curvalg.expr import (
    BlockDiagonal,
    DiagonalPart,
    EntryRestriction,
    Identity,
    Inverse,
    Product,
    Restriction,
    SquareRoot,
    Sum,
    Transpose,
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

J = Jacobian()
_NATURAL = LossFacts("a natural likelihood", convex=True, likelihood=True, fisher_is_ggn=True, classes=True)


def _gauss_newton(w: Any) -> Sequence[Expr]:
    product = multiply(terms.GAUSS_NEWTON)
    return [product, 2 * w.A @ product @ w.S]


def _one_partition(w: Any) -> Sequence[Expr]:
    some, others = block_diagonal({"a": w.A, "m.w": w.S}), block_diagonal({"m.w": w.B, "a": w.P})
    groups = [["b", "m.w"], ["a"]]
    return [
        2 * block_diagonal(w.A) - block_diagonal(w.B),
        block_diagonal(w.A, by=groups) / 2 + block_diagonal(w.B, by=groups),
        some - 2 * others,
        some - others + 3 * Identity,
        -w.FINE + J.T @ J,
        2 * w.COARSE + w.COARSE.transposed(transpose) / 3,
    ]


def _partitions(w: Any) -> Sequence[Expr]:
    whole = w.blocks((["m.w", "b", "a", "m.b"], w.K + w.A))
    multiples = w.blocks(*(([name], c * Identity) for name, c in zip(w.GROUPS, (2, 2, 0, 5), strict=True)))
    split = w.blocks((["a"], w.S), (["m.w", "b"], w.A), (["m.b"], w.B))
    clash = w.blocks((["a"], w.S), (["b"], w.A), (["m.w", "m.b"], w.P))
    turned = w.blocks((["m.b", "m.w"], w.P), (["b", "a"], w.S @ w.B), joint=True)
    return [
        w.FINE + w.COARSE,
        w.COARSE + multiples,
        turned + w.COARSE,
        turned + w.CROSSED + multiples,
        w.CROSSED + w.FINE + 4 * Identity,
        multiples + w.COARSE + w.A,
        whole + multiples,
        whole + w.FINE,
        split + w.COARSE,
        w.COARSE + clash + w.FINE + w.blocks((["b", "a"], w.B), (["m.w"], w.A), (["m.b"], 2 * Identity)),
    ]


LAWS: tuple[Law, ...] = (
    # Transposes
    Law("transpose of a symmetric matrix", "S.T = S", Transpose, transposes.of_symmetric, lambda w: [w.S.T, GGN().T, sqrt(w.A).T]),
    Law("transpose of a sum", "(a*A + b*B + c*I).T = a*A.T + b*B.T + c*I", Transpose, transposes.of(Sum), lambda w: [(2 * w.A - w.B + 3 * Identity).T]),
    Law("transpose of a product", "(A @ B).T = B.T @ A.T", Transpose, transposes.of(Product), lambda w: [(w.A @ w.B).T, (w.A @ w.S @ w.B).T]),
    Law("transpose of an inverse", "inverse(A).T = inverse(A.T)", Transpose, transposes.of(Inverse), lambda w: [inverse(w.A).T]),
    Law("transpose of a sub-matrix", "restrict(A, p).T = restrict(A.T, p)", Transpose, transposes.of(Restriction, EntryRestriction), lambda w: [restrict(w.A, "a").T, restrict(w.A, {"a": slice(1), "m.w": ...}).T]),
    Law("transpose of blocks", "block_diagonal(A).T = block_diagonal(A.T)", Transpose, transposes.of(BlockDiagonal), lambda w: [block_diagonal(w.A).T, w.FINE.T]),
    Law("transpose of a Kronecker product", "(F ⊗ G).T = F.T ⊗ G.T", Transpose, transposes.of_kronecker, lambda w: [w.K.T, 2 * w.K.T @ w.A]),
    Law("transpose of low rank", "(L C R.T).T = R C.T L.T", Transpose, transposes.of_low_rank, lambda w: [w.R.T]),
    # Inverses
    Law("inverse of an inverse", "inverse(inverse(A)) = A", Inverse, inverses.of_inverse, lambda w: [inverse(inverse(w.A))]),
    Law("inverse of a multiple", "inverse(c*A) = inverse(A) / c", Inverse, inverses.of_multiple, lambda w: [inverse(-3 * w.A), inverse(4 * Identity) @ w.A]),
    Law("inverse of a product", "inverse(A @ B) = inverse(B) @ inverse(A)", Inverse, inverses.of_product, lambda w: [inverse(w.A @ w.B), inverse(w.A @ w.S @ inverse(2 * Identity) @ w.B)]),
    # Terms
    Law("Gauss-Newton", "jacobian.T @ loss_hessian @ jacobian = ggn", Product, terms.gauss_newton, _gauss_newton),
    Law("Fisher of a natural likelihood", "fisher = ggn, fisher_mc = ggn_mc", (Fisher, MonteCarloFisher), terms.fisher_is_ggn, lambda w: [Fisher(), MonteCarloFisher(2, 1)], _NATURAL),
    # Sub-matrices
    Law("sub-matrix of a sum", "restrict(a*A + c*I, p) = a*restrict(A, p) + c*restrict(I, p)", Restriction, restrictions.of_sum, lambda w: [restrict(2 * w.A - w.B / 3 + 5 * Identity, "a")]),
    Law(
        "sub-matrix through outputs",
        "restrict(jacobian.T @ X @ jacobian, p) = restrict(jacobian.T, p) @ X @ restrict(jacobian, p)",
        Restriction, restrictions.of_product,
        lambda w: [restrict(J.T @ J, "a"), restrict(LossHessian() @ J, "a")],
    ),
    Law("sub-matrix of a diagonal part", "restrict(diagonal_part(A), p) = diagonal_part(restrict(A, p))", Restriction, restrictions.of_diagonal_part, lambda w: [restrict(diagonal_part(w.A), ["m.w", "a"])]),
    # Square roots
    Law("square of a root", "sqrt(A) @ sqrt(A) = A", Product, roots.squared, lambda w: [sqrt(w.P) @ sqrt(w.P), w.A @ sqrt(w.P) @ sqrt(w.P) @ sqrt(w.P) @ w.B]),
    Law("root of blocks", "sqrt(block_diagonal({p: A})) = block_diagonal({p: sqrt(A)})", SquareRoot, roots.of_blocks, lambda w: [sqrt(block_diagonal({"a": w.P, "m.w": w.Q})), sqrt(w.blocks((["a", "m.w"], w.P), (["m.b", "b"], w.Q), joint=True))]),
    Law("root of a square number", "sqrt(r²*I) = r*I", SquareRoot, roots.of_identity, lambda w: [sqrt(2.25 * Identity) @ w.A, sqrt(w.A - w.A + 4 * Identity)]),
    # Diagonal parts
    Law("diagonal part of a sum", "diagonal_part(a*A + c*I) = a*diagonal_part(A) + c*I", DiagonalPart, parts.of_sum, lambda w: [diagonal_part(2 * w.A - w.B + 3 * Identity), diagonal_part(w.A - w.A + 2 * Identity)]),
    Law("diagonal part of what is diagonal", "diagonal_part(D) = D", DiagonalPart, parts.of_diagonal, lambda w: [diagonal_part(w.D), diagonal_part(diagonal_part(w.A))]),
    Law("diagonal part of a transpose", "diagonal_part(A.T) = diagonal_part(A)", DiagonalPart, parts.of_transpose, lambda w: [diagonal_part(w.A.T)]),
    Law("diagonal part of blocks", "diagonal_part(block_diagonal(A)) = diagonal_part(A)", DiagonalPart, parts.of_blocks, lambda w: [diagonal_part(block_diagonal(w.A, by="module")), diagonal_part(block_diagonal({"b": w.A, "a": w.B})), diagonal_part(w.COARSE)]),
    # Block-diagonals
    Law("nested blocks", "{p: {q: A, r: B}} = {q: A, r: B} where q and r are p", BlockDiagonal, blocks.nested, lambda w: [w.blocks((["m.w", "a", "b"], w.blocks((["a", "m.w"], w.A), (["b"], w.B), joint=True)), (["m.b"], w.S), joint=True)]),
    Law("blocks that are multiples", "{(p, q): c*I} = {p: c*I, q: c*I}", BlockDiagonal, blocks.of_multiples, lambda w: [w.CROSSED, block_diagonal({"a": w.A - w.A + 2 * Identity, "b": w.S})]),
    Law("blocks of one multiple", "{p: c*I, q: c*I} = c*I", BlockDiagonal, blocks.of_one_multiple, lambda w: [w.blocks((["a", "b"], 2 * Identity), (["m.w", "m.b"], 2 * Identity)), block_diagonal(w.A - w.A + 3 * Identity), block_diagonal({"a": w.A - w.A})]),
    Law("sum over one partition", "a*{p: A, q: B} + b*{p: C, q: D} = {p: a*A + b*C, q: a*B + b*D}", Sum, blocks.of_sum, _one_partition),
    Law("shift of blocks", "a*{p: A, q: B} + c*I = {p: a*A + c*I, q: a*B + c*I} where p and q are everything", Sum, blocks.of_shift, lambda w: [2 * block_diagonal(w.A, by="module") - Identity, w.COARSE / 3 + 2 * Identity]),
    Law("product over one partition", "{p: A, q: B} @ {p: C, q: D} = {p: A @ C, q: B @ D}", Product, blocks.of_product, lambda w: [w.COARSE @ w.COARSE.T.simplify(), block_diagonal({"a": w.A, "b": w.B}) @ block_diagonal({"b": w.S, "a": w.B}) @ w.A]),
    Law("sum over different partitions", "{(p, q): A, r: B} + {p: C, (q, r): D} = {(p, q, r): {(p, q): A, r: B} + {p: C, (q, r): D}}", Sum, partitions.of_sum, _partitions),
    # Array leaves
    Law("sum of diagonals", "a*diag(u) + b*diag(v) = diag(a*u + b*v)", Sum, leaves.sum_of_diagonals, lambda w: [2 * w.D - w.E / 3 + Identity, -w.E + w.A]),
    Law("product of diagonals", "diag(u) @ diag(v) = diag(u v)", Product, leaves.product_of_diagonals, lambda w: [w.D @ w.E, w.A @ w.D @ w.E @ w.D @ w.B]),
    Law("product of Kronecker products", "(F ⊗ G) @ (H ⊗ I) = (F @ H) ⊗ (G @ I)", Product, leaves.product_of_kroneckers, lambda w: [w.K @ w.L, w.A @ w.L @ w.K @ w.K @ w.B]),
    Law("sum in one eigenbasis", "a*Q diag(u) Q.T + b*Q diag(v) Q.T + c*I = Q diag(a*u + b*v + c) Q.T", Sum, leaves.sum_of_eigenbases, lambda w: [2 * w.U - w.V / 3 + 3 * Identity, w.X + w.Y - w.U + w.A + Identity, -w.X, w.U - Identity]),
    Law("product in one eigenbasis", "Q diag(u) Q.T @ Q diag(v) Q.T = Q diag(u v) Q.T", Product, leaves.product_of_eigenbases, lambda w: [w.U @ w.V @ w.U, w.A @ w.X @ w.Y @ w.U]),
)  # fmt: skip
"""All laws, in the order in which they are tried."""
