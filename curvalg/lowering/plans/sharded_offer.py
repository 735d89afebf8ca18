"""What is offered where parameters are sharded: what a process can multiply with its part of vectors."""

from __future__ import annotations

import curvalg.expr as alg
from curvalg.errors import ExpressionError
from curvalg.expr.node import Expr
from curvalg.expr.nodes.arrays import ArrayLeaf
from curvalg.expr.term import MatrixTerm, Term
from curvalg.expr.terms import Jacobian, LossHessian

_NOT = {
    alg.BlockDiagonal: "block-diagonal matrices",
    alg.Restriction: "sub-matrices",
    Jacobian: "matrices with rows of outputs",
    LossHessian: "matrices with rows of outputs",
    MatrixTerm: "matrices that are made of layers, as KFAC and diagonals,",
    ArrayLeaf: "arrays over whole parameters",
}


def require_offered(expr: Expr) -> None:
    """Raise for an expression that no process can multiply with its part of a vector.

    Raises:
        ExpressionError: says which part of it.
    """
    for node in expr.walk():
        if isinstance(node, alg.Transpose) and not isinstance(node.expr, Term):
            _refuse(node, "this transpose")
        for kind, what in _NOT.items():
            if isinstance(node, kind) and not isinstance(node, alg.Diagonal):
                _refuse(node, what)


def _refuse(node: Expr, what: str) -> None:
    raise ExpressionError(
        f"{node}: {what} are not offered where parameters are sharded; there are sums and products of local terms "
        "(hessian, ggn, fisher, covariance, hierarchical terms), the identity, and inverses of these by iterations. Make the "
        "Problem of a whole model on every process (group= without shard=) where it fits"
    )
