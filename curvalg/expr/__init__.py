"""Unbound expressions: nodes, the algebra, terms, facts and printing. Imports no torch."""

from curvalg.expr.entries import Entries
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.node import Expr, Space
from curvalg.expr.nodes.approximations import DiagonalEstimate, DiagonalPart, Nystrom, diagonal_part, nystrom
from curvalg.expr.nodes.arrays import ArrayLeaf, Diagonal, Eigenbasis, Kronecker, LowRank
from curvalg.expr.nodes.block_diagonal import Block, BlockDiagonal, Partition, block_diagonal
from curvalg.expr.nodes.composite import MAX_DEPTH
from curvalg.expr.nodes.constants import Identity, IdentityExpr, Zero, ZeroExpr
from curvalg.expr.nodes.inverse import SOLVERS, Inverse, inverse
from curvalg.expr.nodes.products import MAX_FACTORS, Product, multiply
from curvalg.expr.nodes.restrictions import EntryRestriction, Restriction, restrict
from curvalg.expr.nodes.roots import SquareRoot, inv_sqrt, sqrt
from curvalg.expr.nodes.sums import Sum, add
from curvalg.expr.nodes.transposes import Transpose, transpose
from curvalg.expr.scalars import as_coefficient
from curvalg.expr.term import DatasetTerm, GradientTerm, MatrixTerm, NamedExpr, Term
from curvalg.expr.terms import (
    ALIASES,
    BUILTIN,
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

__all__ = [
    "ALIASES",
    "BUILTIN",
    "MAX_DEPTH",
    "MAX_FACTORS",
    "Space",
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
    "Entries",
    "EntryRestriction",
    "Expr",
    "Facts",
    "GradientTerm",
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
