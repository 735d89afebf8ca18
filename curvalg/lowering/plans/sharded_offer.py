"""What is offered where parameters are sharded: what a process can multiply with its part of vectors."""

from __future__ import annotations

import curvalg.expr as alg
from curvalg.errors import ExpressionError
from curvalg.expr.node import Expr
from curvalg.expr.nodes.arrays import ArrayLeaf
from curvalg.expr.term import MatrixTerm, Term
from curvalg.expr.terms import Jacobian, LossHessian
from curvalg.lowering.blocks.owned_matrix import OwnedMatrix, is_layerwise
from curvalg.problem import Problem
from curvalg.problem.model.sharded.sharded_model import ShardedModel

_NOT = {
    alg.BlockDiagonal: "block-diagonal matrices",
    alg.Restriction: "sub-matrices",
    alg.EntryRestriction: "sub-matrices",
    Jacobian: "matrices with rows of outputs",
    LossHessian: "matrices with rows of outputs",
    ArrayLeaf: "arrays over whole parameters",
}
_OF_WHOLE = {
    alg.SquareRoot: "square roots of matrices that are not made of layers",
    alg.DiagonalPart: "diagonals found by products (there are ggn_diagonal, and curvalg.estimate.diagonal)",
    alg.DiagonalEstimate: "diagonals found by products (there are ggn_diagonal, and curvalg.estimate.diagonal)",
    alg.Nystrom: "Nyström approximations",
}
"""What is made of products with whole vectors."""


def require_offered(expr: Expr, problem: Problem) -> None:
    """Raise for an expression that no process can multiply with its part of a vector.

    Raises:
        ExpressionError: says which part of it.
    """
    for node in expr.walk():
        if isinstance(node, MatrixTerm):
            _require_layers(node, problem)
        if isinstance(node, alg.Transpose) and not isinstance(node.expr, (Term, MatrixTerm, OwnedMatrix)):
            _refuse(node, "this transpose")
        for kind, what in _NOT.items():
            if isinstance(node, kind) and not isinstance(node, alg.Diagonal):
                _refuse(node, what)
        for kind, what in _OF_WHOLE.items():
            if isinstance(node, kind) and not is_layerwise(node):
                _refuse(node, what)


def _require_layers(term: MatrixTerm, problem: Problem) -> None:
    """Raise for a matrix that does not lie layer by layer on the processes."""
    if type(term).of_layers is MatrixTerm.of_layers:
        _refuse(term, "matrices that are not made layer by layer (that have no of_layers)")
    if type(term).repeat is not MatrixTerm.repeat:
        _refuse(term, "matrices that take more than two passes over the data")
    model = problem.model
    if isinstance(model, ShardedModel) and (model.grid.copies > 1 or model.grid.tensor is not None):
        raise ExpressionError(
            f"{term}: matrices that are made of layers are not offered where layers themselves are cut by parallelize_module; "
            "shard the model by fully_shard alone, or make the Problem of a whole model with shard='parameters'"
        )


def _refuse(node: Expr, what: str) -> None:
    raise ExpressionError(
        f"{node}: {what} are not offered where parameters are sharded; there are sums and products of local terms "
        "(hessian, ggn, fisher, covariance, hierarchical terms), matrices made of layers (kfac, ekfac, diagonals), the "
        "identity, and inverses of these. Make the Problem of a whole model on every process (group= without shard=) where it "
        "fits"
    )
