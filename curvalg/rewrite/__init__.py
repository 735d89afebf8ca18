"""Rewriting expressions by exact laws. Imports no torch."""

from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr
from curvalg.rewrite.engine import Law, Rewritten, Step, rewrite
from curvalg.rewrite.laws import LAWS


def simplify(expr: Expr, loss: LossFacts | None = None) -> Rewritten:
    """Apply the law book to an expression; see :data:`curvalg.rewrite.laws.LAWS`."""
    return rewrite(expr, LAWS, loss)


__all__ = ["LAWS", "Law", "Rewritten", "Step", "rewrite", "simplify"]
