"""Solvers that know no expression: a product in, a solution and a report per column out."""

from curvalg.solve.cg import cg
from curvalg.solve.direct import factorize
from curvalg.solve.minres import minres
from curvalg.solve.solve_result import Matmul, SolveResult

__all__ = ["Matmul", "SolveResult", "cg", "factorize", "minres"]
