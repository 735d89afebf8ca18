"""Unbound expressions: nodes, the algebra, terms, facts and printing. Imports no torch."""

from curvalg.expr.blocks import Block, BlockDiagonal, Partition, block_diagonal
from curvalg.expr.constants import Identity, IdentityExpr, Zero, ZeroExpr
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.inverses import SOLVERS, Inverse, inverse
from curvalg.expr.leaves import ArrayLeaf, Diagonal, Eigenbasis, Kronecker, LowRank
from curvalg.expr.node import Expr
from curvalg.expr.parts import DiagonalEstimate, DiagonalPart, Nystrom, diagonal_part, nystrom
from curvalg.expr.products import Product, multiply
from curvalg.expr.restrictions import Restriction, restrict
from curvalg.expr.roots import SquareRoot, inv_sqrt, sqrt
from curvalg.expr.scalars import as_coefficient
from curvalg.expr.sums import Sum, add
from curvalg.expr.term import DatasetTerm, MatrixTerm, NamedExpr, Term
from curvalg.expr.terms import (
    GGN,
    CenteredCovariance,
    Covariance,
    Fisher,
    Hessian,
    Jacobian,
    LossHessian,
    MonteCarloFisher,
    MonteCarloGGN,
    Residual,
)
from curvalg.expr.transposes import Transpose, transpose

__all__ = [
    "GGN",
    "SOLVERS",
    "ArrayLeaf",
    "Block",
    "BlockDiagonal",
    "CenteredCovariance",
    "Covariance",
    "DatasetTerm",
    "Diagonal",
    "DiagonalEstimate",
    "DiagonalPart",
    "Eigenbasis",
    "Expr",
    "Facts",
    "Fisher",
    "Hessian",
    "Identity",
    "IdentityExpr",
    "Inverse",
    "Jacobian",
    "Kronecker",
    "LossFacts",
    "LossHessian",
    "LowRank",
    "MatrixTerm",
    "MonteCarloFisher",
    "MonteCarloGGN",
    "NamedExpr",
    "Nystrom",
    "Partition",
    "Product",
    "Residual",
    "Restriction",
    "SquareRoot",
    "Sum",
    "Term",
    "Transpose",
    "Zero",
    "ZeroExpr",
    "add",
    "as_coefficient",
    "block_diagonal",
    "diagonal_part",
    "inv_sqrt",
    "inverse",
    "multiply",
    "nystrom",
    "restrict",
    "sqrt",
    "transpose",
]
