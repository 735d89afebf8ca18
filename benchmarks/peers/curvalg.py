"""curvalg as it comes: what it records is kept between products."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.peers.base import Peer, Run, answers
from benchmarks.workload import DRAWS, Workload
from curvalg import Expr, Identity, Problem, inverse, nystrom, registry
from curvalg.estimate import eigsh, influence, self_influence, spectral_density, trace
from curvalg_plugins.laplace import laplace


def matrix(name: str) -> Expr:
    """hessian, ggn, covariance or their sum."""
    if name == "sum":
        return registry.build("hessian") + registry.build("ggn") + registry.build("covariance")
    return registry.build(name)


class Curvalg(Peer):
    """Each answer that is more than a product starts from a fresh problem, so that nothing is known before."""

    name = "curvalg"
    distribution = "curvalg"
    # A linearised program is tried at the 32nd product.
    settles = 34
    fuses = True
    options: ClassVar[Mapping[str, Any]] = {}

    def problem(self, workload: Workload) -> Problem:
        """A fresh one."""
        return Problem(workload.model, workload.loss, workload.data, **self.options)

    @answers("hessian", "ggn", "covariance", "sum")
    def product(self, workload: Workload, question: str) -> Run:
        """Recorded at the first product, which is not in the time."""
        op = matrix(question).lower(self.problem(workload))
        return lambda: op @ workload.vectors

    @answers("kfac exact", "kfac empirical", "ekfac exact", "ekfac empirical")
    def kronecker(self, workload: Workload, question: str) -> Run:
        """Counting the data and checking layer records on first use are inside."""
        term, fisher = question.split()
        return lambda: registry.build(term, fisher=fisher).lower(self.problem(workload)) @ workload.vectors

    def kfac_inverse_operator(self, workload: Workload) -> Any:
        """Of a fresh problem about linear layers and convolutions."""
        problem = Problem(workload.model, workload.loss, workload.data, params=list(workload.affine), **self.options)
        damped = registry.build("kfac", fisher="empirical") + workload.sizes.damping * Identity
        return inverse(damped).lower(problem)

    @answers("kfac inverse")
    def kfac_inverse(self, workload: Workload, question: str) -> Run:
        """Built in the time."""
        return lambda: self.kfac_inverse_operator(workload) @ workload.affine_vectors

    @answers("kfac inverse again")
    def kfac_inverse_again(self, workload: Workload, question: str) -> Run:
        """Of one operator."""
        op = self.kfac_inverse_operator(workload)
        return lambda: op @ workload.affine_vectors

    @answers("ggn diagonal")
    def diagonal(self, workload: Workload, question: str) -> Run:
        """Times the vector of ones."""
        ones = torch.ones_like(workload.vector)
        return lambda: registry.build("ggn_diagonal").lower(self.problem(workload)) @ ones

    @answers("solve gram")
    def gram(self, workload: Workload, question: str) -> Run:
        """The strategies find the Gram matrix by themselves."""
        damped = inverse(registry.build("ggn") + workload.sizes.damping * Identity, rtol=workload.sizes.rtol)
        return lambda: damped.lower(self.problem(workload)) @ workload.vectors

    @answers("solve gram again")
    def gram_again(self, workload: Workload, question: str) -> Run:
        """With everything kept."""
        damped = inverse(registry.build("ggn") + workload.sizes.damping * Identity, rtol=workload.sizes.rtol)
        op = damped.lower(self.problem(workload))
        return lambda: op @ workload.vectors

    @answers("solve gram other damping")
    def gram_other_damping(self, workload: Workload, question: str) -> Run:
        """The Gram matrix is kept; each run has a damping of its own."""
        problem, ggn = self.problem(workload), registry.build("ggn")
        steps = itertools.count()

        def run() -> Tensor:
            damping = workload.sizes.damping * (1 + 1e-3 * next(steps))
            op = inverse(ggn + damping * Identity, rtol=workload.sizes.rtol).lower(problem)
            solution: Tensor = op @ workload.vectors
            return solution

        return run

    @answers("solve cg", "solve cg kfac", "solve cg nystrom")
    def conjugate_gradients(self, workload: Workload, question: str) -> Run:
        """Plain and preconditioned."""
        sizes, ggn = workload.sizes, registry.build("ggn")
        shift = sizes.damping * Identity
        preconditioners = {
            "solve cg": None,
            "solve cg kfac": registry.build("kfac", fisher="exact") + shift,
            "solve cg nystrom": nystrom(ggn, min(sizes.rank, workload.size)) + shift,
        }
        chosen = preconditioners[question]
        damped = inverse(ggn + shift, solver="cg", rtol=sizes.rtol, preconditioner=chosen, on_fail="warn")
        return lambda: damped.lower(self.problem(workload)) @ workload.vectors

    @answers("influence scores", "self influence")
    def influence(self, workload: Workload, question: str) -> Run:
        """The matrix is made already, its check is inside."""
        problem, queries = self.problem(workload), self.queries(workload)
        damped = registry.build("ekfac", fisher="empirical") + workload.sizes.damping * Identity
        op = inverse(damped).lower(problem).prepare()
        if question == "self influence":
            return lambda: self_influence(op)

        def run() -> Tensor:
            scores = influence(op, queries).scores
            assert isinstance(scores, Tensor)
            return scores

        return run

    def queries(self, workload: Workload) -> Problem:
        """The first rows of the data as a problem."""
        (X, y), *_ = workload.data
        count = workload.sizes.queries
        return Problem(workload.model, workload.loss, (X[:count], y[:count]), **self.options)

    @answers("functional variance", "posterior draws")
    def posterior(self, workload: Workload, question: str) -> Run:
        """The matrix is made already."""
        (X, _), *_ = workload.data
        made, asked = laplace(self.problem(workload), "kfac(joint=False)"), X[: workload.sizes.asked]
        if question == "functional variance":
            return lambda: made.functional_variance(asked)
        return lambda: made.sample(DRAWS).var(0).sum()

    @answers("eigenvalues")
    def eigenvalues(self, workload: Workload, question: str) -> Run:
        """Descending."""
        sizes, hessian = workload.sizes, registry.build("hessian")

        def run() -> Tensor:
            op = hessian.lower(self.problem(workload))
            return eigsh(op, sizes.eigenvalues, which="LA", tol=sizes.tol).eigenvalues.flip(0)

        return run

    @answers("density")
    def density(self, workload: Workload, question: str) -> Run:
        """The second moment of the nodes."""
        sizes, hessian = workload.sizes, registry.build("hessian")

        def run() -> Tensor:
            op = hessian.lower(self.problem(workload))
            found = spectral_density(op, probes=sizes.probes, steps=sizes.steps)
            return (found.weights * found.nodes**2).sum(1).mean()

        return run

    @answers("trace ggn", "trace hessian")
    def trace(self, workload: Workload, question: str) -> Run:
        """By whatever method it chooses."""
        term = registry.build(question.split()[1])

        def run() -> Tensor:
            found = trace(term.lower(self.problem(workload)), products=workload.sizes.products)
            return torch.tensor(float(found.value))

        return run
