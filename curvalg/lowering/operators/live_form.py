"""The number Σₖ lₖᵀ A rₖ of one batch, with all that its derivative comes from.

A term is a pair (u, u̇) in output space with lᵀA r = lᵀ(∂_r J)ᵀu + (J l)ᵀ u̇(z, J r). For one batch, z = f(θ), a = J l and
b = J r are taken with graphs; F(z, a, b) = aᵀ u̇(z, b) is differentiated by its three arguments, each a leaf of its own, and the
results are pulled back together. The other part is S(θ, u) = lᵀ ∇θ(uᵀ J r), differentiated by θ and by u, and that pulled back
through u(z). So the derivative is one of reverse mode, exact to rounding, and of third order in the model.

A multiple of ∇L ∇Lᵀ over the whole data set is no sum over batches, but its derivative is: that of wᵀ∇L = (J w)ᵀ∂L/∂z with
w = Σₖ (∇Lᵀrₖ) lₖ + (∇Lᵀlₖ) rₖ held fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.expr.term import Term
from curvalg.problem.passes.live_batch import LiveBatch
from curvalg.tensors.memory import wide


@dataclass(frozen=True)
class DifferentiableSum:
    """The matrix Σ c term + m (s/N) ∇L ∇Lᵀ, whose derivative is known.

    Args:
        entries: (c, term), terms that take one pass over the data.
        mean: m.
    """

    entries: Sequence[tuple[float, Term]]
    mean: float = 0.0


@dataclass(frozen=True)
class Ends:
    """Tensors with graphs, and the gradients with respect to them that are to be pulled back together."""

    roots: list[Tensor]
    cotangents: list[Tensor]

    def gradients(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the leaves."""
        # Where the model is linear in its parameters, tangents do not depend on them.
        live = [(root, u) for root, u in zip(self.roots, self.cotangents, strict=True) if root.requires_grad]
        roots, cotangents = [root for root, _ in live], [u for _, u in live]
        if not roots:
            return [torch.zeros_like(leaf) for leaf in leaves]
        try:
            return list(
                torch.autograd.grad(
                    roots, leaves, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            )
        except (RuntimeError, NotImplementedError) as error:
            raise lacking(error) from error


class LiveForm:
    """The number Σₖ lₖᵀ A rₖ of one batch, with all that its derivative comes from.

    Args:
        entries: A = Σ c term.
        leaves: the parameters that vectors are of.
        z: the output with its graph.
        make: a leaf of z's shape -> the batch.
    """

    def __init__(
        self,
        entries: Sequence[tuple[float, Term]],
        leaves: list[Tensor],
        z: Tensor,
        make: Callable[[Tensor], LiveBatch],
    ) -> None:
        self.entries, self.leaves, self.z = entries, leaves, z
        self.own: list[Tensor] = []
        """Leaves that were made on the way."""
        self._point = self._leaf(z)
        self._batch = make(self._point)

    def __call__(
        self, left: list[Tensor], right: list[Tensor], along: list[Tensor] | None = None
    ) -> tuple[float, Ends]:
        """The number, and what is to be pulled back.

        Args:
            left, right: columns by parameter (K, *shape).
            along: w by parameter (1, *shape); the derivative of the loss of the batch along it is added.
        """
        try:
            return self._evaluated(left, right, along)
        except (RuntimeError, NotImplementedError) as error:
            raise lacking(error) from error

    def _pushed(self, *directions: list[Tensor]) -> list[Tensor]:
        """The tangents J v (K, *shape of z) of columns by parameter, with graphs."""
        zero = self.z.new_zeros(len(directions[0][0]), *self.z.shape).requires_grad_()
        self.own.append(zero)
        pulled = self._grad([self.z], self.leaves, [zero], batched=True)
        return [self._grad([_dot(pulled, vectors)], [zero])[0] for vectors in directions]

    def _evaluated(self, left: list[Tensor], right: list[Tensor], along: list[Tensor] | None) -> tuple[float, Ends]:
        pushed = self._pushed(left, right)
        a, b = (self._leaf(t) for t in pushed)
        total = torch.zeros((), dtype=self.z.dtype, device=self.z.device)
        batch = self._batch
        cotangents = [(c, u) for c, term in self.entries if (u := term.cotangent(batch)) is not None]
        for left_k, right_k in zip(a, b, strict=True):
            for c, term in self.entries:
                if (dot := term.cotangent_dot(batch, right_k)) is not None:
                    total = total + c * (left_k * dot).sum()
        inner = [self._point, a, b]
        if along is not None:
            pushed += self._pushed(along)
            inner.append(self._leaf(pushed[-1]))
            total = total + (inner[-1][0] * batch.loss_gradient).sum()
        value, roots, grads = float(wide(total.detach())), [self.z, *pushed], []
        if cotangents:
            u = sum((c * u for c, u in cotangents), torch.zeros_like(self.z))
            second, by_u = self._second(u.detach(), left, right)
            value += float(second.detach())
            total = total + (u * by_u).sum()
            roots.append(second)
            grads.append(torch.ones_like(second))
        first = (
            torch.autograd.grad(total, inner, retain_graph=True, allow_unused=True, materialize_grads=True)
            if total.requires_grad
            else [torch.zeros_like(t) for t in inner]
        )
        end = [*first, *grads]
        if total.requires_grad:  # what the loss depends on besides its output
            roots.append(total)
            end.append(torch.ones_like(total))
        return value, Ends(roots, end)

    def _second(self, u: Tensor, left: list[Tensor], right: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The number Σₖ lₖᵀ(∂ᵣJ)ᵀu with its graph to the parameters, and its gradient by u."""
        u = self._leaf(u)
        pulled = self._grad([self.z], self.leaves, [u])
        sums = torch.stack([_dot(pulled, [v[k] for v in right]) for k in range(len(right[0]))])
        unit = torch.eye(len(sums), dtype=sums.dtype, device=sums.device)
        turned = self._grad([sums], self.leaves, [unit], batched=True)
        number = _dot(turned, left)
        (by_u,) = torch.autograd.grad(number, u, retain_graph=True, allow_unused=True, materialize_grads=True)
        return number, by_u.detach()

    def _grad(
        self,
        roots: list[Tensor],
        leaves: Sequence[Tensor],
        cotangents: list[Tensor] | None = None,
        batched: bool = False,
    ) -> list[Tensor]:
        """Gradients with a graph of their own; zero where there are none."""
        if not any(root.requires_grad for root in roots):
            count = [] if not batched or cotangents is None else [len(cotangents[0])]
            return [leaf.new_zeros(*count, *leaf.shape) for leaf in leaves]
        found = torch.autograd.grad(
            roots,
            leaves,
            cotangents,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
            is_grads_batched=batched,
        )
        self.own += [t for t in found if t.is_leaf]  # zeros that torch makes, which require gradients
        return list(found)

    def _leaf(self, t: Tensor) -> Tensor:
        leaf = t.detach().clone().requires_grad_()
        self.own.append(leaf)
        return leaf


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists of tensors, in the precision of the second."""
    return sum(
        ((a.to(b.dtype) * b).sum() for a, b in zip(left, right, strict=True)), torch.zeros((), device=left[0].device)
    )


def lacking(error: Exception) -> ProblemError:
    """The error for a model whose curvature cannot be differentiated."""
    if isinstance(error, ProblemError):
        return error
    return ProblemError(
        f"the curvature of the model has no derivative in torch: {str(error).strip().splitlines()[0]}. An operation of the "
        "model or the loss lacks a third derivative; write it in elementary operations"
    )
