"""Solvers that know no expression: a product in, a solution and a report per column out."""

from curvalg.solve import lanczos, quadrature, search
from curvalg.solve.cg import cg
from curvalg.solve.direct import NOISE, condition, eigenpairs, factorize
from curvalg.solve.ends import SIDES, surpassed, unrivalled, wanted
from curvalg.solve.minres import minres
from curvalg.solve.orthogonal import complete, grown, orthonormalise
from curvalg.solve.powers import exponents, norms, scaled
from curvalg.solve.solve_result import Matmul, SolveResult
from curvalg.solve.trail import Mark, Trail

__all__ = [
    "NOISE",
    "SIDES",
    "Mark",
    "Matmul",
    "SolveResult",
    "Trail",
    "cg",
    "complete",
    "condition",
    "eigenpairs",
    "exponents",
    "factorize",
    "grown",
    "lanczos",
    "minres",
    "norms",
    "orthonormalise",
    "quadrature",
    "scaled",
    "search",
    "surpassed",
    "unrivalled",
    "wanted",
]
