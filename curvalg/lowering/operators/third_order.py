"""Derivatives of curvature: the gradient of Σₖ lₖᵀ A(θ) rₖ by the parameters, and by all that model and loss depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from curvalg.errors import ExpressionError, ProblemError
from curvalg.expr import Expr
from curvalg.expr.affine_form import affine
from curvalg.expr.term import DatasetTerm, Term
from curvalg.expr.terms import CenteredCovariance, Covariance
from curvalg.lowering.operators.live_form import DifferentiableSum, LiveForm
from curvalg.lowering.operators.third_order_check import swear_third_order
from curvalg.problem import Problem, Snapshot
from curvalg.problem.passes.live_batch import LiveEvaluation
from curvalg.tensors.bits import fingerprint
from curvalg.tensors.graph import leaf_tensors
from curvalg.tensors.memory import wide, widest

WIDTH = 16
"""Pairs of vectors that are taken through the network at a time."""


@dataclass(frozen=True)
class FormGradient:
    """The derivative of Σₖ lₖᵀ A rₖ.

    Args:
        parameters: the gradient (D,) by the chosen parameters.
        others: gradients by other tensors, in the order in which these were given.
    """

    parameters: Tensor
    others: list[Tensor]


def terms_of(expr: Expr) -> DifferentiableSum:
    """A matrix as a sum with a derivative, without the multiple of the identity, which has none.

    Raises:
        ExpressionError: it is none.
    """
    entries: list[tuple[float, Term]] = []
    mean = 0.0
    for c, part in affine(expr)[0]:
        if isinstance(part, CenteredCovariance):
            entries.append((c, Covariance()))
            mean -= c
        elif isinstance(part, Term) and not isinstance(part, DatasetTerm) and part.domain_params is None:
            entries.append((c, part))
        else:
            raise ExpressionError(
                f"{part} has no derivative here: expected a sum of terms that take one pass over the data (hessian, ggn, "
                "fisher, residual, covariance), of centered_covariance and of multiples of the identity; in the place of a "
                "Kronecker or diagonal approximation take the matrix that it approximates, and for some of the parameters make "
                "a Problem with params=..."
            )
    return DifferentiableSum(entries, mean)


def form_gradient(
    matrix: DifferentiableSum,
    problem: Problem,
    snapshot: Snapshot,
    left: Tensor,
    right: Tensor,
    others: Sequence[Tensor] = (),
) -> FormGradient:
    """The derivative of Σₖ lₖᵀ A rₖ, by one pass over the data; two where ∇L is needed.

    Args:
        matrix: A.
        problem, snapshot: that it is of, and where.
        left, right: l and r, columns (D, K).
        others: what else to differentiate by, some of :func:`further_leaves`; the same on all processes.

    Raises:
        ProblemError: the model lacks a third derivative, or torch's is wrong.
        LossError: a term is made of what has no derivative.
    """
    if problem.autocast is not None:
        raise ProblemError(
            "derivatives of curvature are of a model in its own precision; make the Problem without autocast="
        )
    with problem.lock, problem.differentiating():
        return _Sum(matrix, problem, snapshot, others).over(left, right)


class _Sum:
    """The derivative, summed over batches and over groups of columns."""

    def __init__(
        self, matrix: DifferentiableSum, problem: Problem, snapshot: Snapshot, others: Sequence[Tensor]
    ) -> None:
        self.matrix, self.problem, self.snapshot = matrix, problem, snapshot
        self.total = torch.zeros(problem.size, dtype=widest(problem.device), device=problem.device)
        # Made here, not where a batch depends on one: a process without data shares in the sums over all.
        self.others = {id(t): torch.zeros_like(t) for t in others}

    def over(self, left: Tensor, right: Tensor) -> FormGradient:
        problem, totals = self.problem, self.problem.totals
        denominator = torch.tensor(totals.denominator, dtype=problem.dtype, device=problem.device).requires_grad_()
        by_denominator = torch.zeros_like(denominator)
        live: Tensor | float = 0.0
        along = self._along(left, right) if self.matrix.mean else None
        for found in problem.evaluations(self.snapshot):
            evaluation = LiveEvaluation(problem, self.snapshot, found.sample)
            swear_third_order(self.matrix, evaluation)
            further = along
            for columns in zip(left.split(WIDTH, 1), right.split(WIDTH, 1), strict=True):
                by_denominator += self._batch(evaluation, *columns, further, denominator)
                further = None  # once a batch
            live = live + problem.need_loss().live_denominator(found.sample.target)
        by_denominator = problem.group.sum(by_denominator)
        if isinstance(live, Tensor) and live.requires_grad and problem.need_loss().reduction == "mean":
            self._add(live, by_denominator)
        self._share()
        return FormGradient(self.total.to(problem.dtype), list(self.others.values()))

    def _along(self, left: Tensor, right: Tensor) -> Tensor:
        """The direction w whose wᵀ∇L has the derivative of the part m (s/N) Σₖ (∇Lᵀlₖ)(∇Lᵀrₖ), (D, 1)."""
        problem, totals = self.problem, self.problem.totals
        gradient = wide(problem.gradient())
        factor = self.matrix.mean * totals.scale / totals.count
        l, r = wide(left), wide(right)  # noqa: E741
        by_left, by_right = factor * (gradient @ l), factor * (gradient @ r)
        return (l @ by_right + r @ by_left).to(left.dtype)[:, None]

    def _batch(
        self, evaluation: LiveEvaluation, left: Tensor, right: Tensor, along: Tensor | None, denominator: Tensor
    ) -> Tensor:
        """Add what one batch and some columns give; returns the derivative by the denominator."""
        problem = self.problem
        leaves = [value.requires_grad_() for value in evaluation.values()]
        names = _further(problem)
        others = {name: self.snapshot.state[name].detach().clone().requires_grad_() for name in names}
        z, form = evaluation.connected(leaves, others)
        make = partial(evaluation.live_batch, form=form, share=1 / denominator)
        form_of = LiveForm(self.matrix.entries, leaves, z, make)
        _, end = form_of(_rows(problem, left), _rows(problem, right), None if along is None else _rows(problem, along))
        private = {id(t) for t in (*leaves, *others.values(), denominator, *form_of.own)}
        foreign = [t for t in leaf_tensors(end.roots) if id(t) not in private]
        gradients = end.gradients([*leaves, *others.values(), denominator, *foreign])
        count = len(leaves)
        problem.layout.add_(self.total[None], [g[None] for g in gradients[:count]])
        for (_, live), g in zip(names.items(), gradients[count:], strict=False):
            self._keep(live, g)
        for tensor, g in zip(foreign, gradients[count + len(others) + 1 :], strict=True):
            self._keep(tensor, g)
        return gradients[count + len(others)]

    def _share(self) -> None:
        """Add what the other processes found."""
        self.total, *gradients = self.problem.group.sum([self.total, *self.others.values()])
        self.others = dict(zip(self.others, gradients, strict=True))

    def _add(self, tensor: Tensor, gradient: Tensor) -> None:
        """Pull a gradient of a tensor with a graph back to its leaves."""
        leaves = leaf_tensors([tensor])
        for leaf, g in zip(
            leaves, torch.autograd.grad(tensor, leaves, gradient.to(tensor.dtype), retain_graph=True), strict=True
        ):
            self._keep(leaf, g)

    def _keep(self, tensor: Tensor, gradient: Tensor) -> None:
        if id(tensor) in self.others:
            self.others[id(tensor)] = self.others[id(tensor)] + gradient.detach()


def _rows(problem: Problem, columns: Tensor) -> list[Tensor]:
    """Columns (D, K) as tensors (K, *shape) by parameter."""
    return list(problem.layout.unflatten_rows(columns.T).values())


def _further(problem: Problem) -> dict[str, Tensor]:
    """Parameters of the model that require gradients but are not chosen, by the names of the state."""
    chosen = {id(p) for p in problem.model.chosen.values()}
    tensors = {name: owner[key] for name, owner, key in problem.slots()}
    return {name: t for name, t in tensors.items() if t.requires_grad and id(t) not in chosen}


def further_leaves(problem: Problem, snapshot: Snapshot) -> list[Tensor]:
    """All tensors that require gradients and that model and loss depend on, besides the chosen parameters.

    One pass over the data, for a batch may take another way through the model.

    Raises:
        GroupError: several processes depend on different ones, besides those of the model.
    """
    of_loss = [] if problem.loss is None else [t for t in problem.loss.tensors().values() if t.requires_grad]
    leaves_of_loss = [leaf for t in of_loss for leaf in (leaf_tensors([t]) or [t])]  # a leaf has no graph
    named = {id(t): t for t in (*_further(problem).values(), *leaves_of_loss)}
    found = dict(named)
    with problem.lock, problem.differentiating():
        for each in problem.evaluations(snapshot):
            evaluation = LiveEvaluation(problem, snapshot, each.sample)
            leaves = [value.requires_grad_() for value in evaluation.values()]
            z, form = evaluation.connected(leaves, {})
            point = z.detach().requires_grad_()
            value = evaluation.live_batch(point, form, 1.0).value()
            own = {id(t) for t in (*leaves, point)}
            denominator = problem.need_loss().live_denominator(each.sample.target)
            roots = [z, value, *([denominator] if isinstance(denominator, Tensor) else [])]
            found |= {id(t): t for t in leaf_tensors(roots) if id(t) not in own}
    if not problem.group.alone:
        _agree(problem, [t for t in found.values() if id(t) not in named])
    return list(found.values())


def _agree(problem: Problem, nameless: Sequence[Tensor]) -> None:
    """Refuse sums over processes of gradients by tensors that have nothing but their order and their numbers in common."""
    shown = [(tuple(t.shape), str(t.dtype), int(fingerprint(t))) for t in nameless]
    problem.group.agree(
        {
            "tensors (shape, dtype, hash of their numbers) that model or loss depend on and that require gradients": shown
        },
        "a process finds them in the graphs of its own batches: give every rank a batch, and all ranks the same tensors, or "
        "make them parameters of the model or the loss",
    )
