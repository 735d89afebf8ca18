"""Tangents J v from the recorded graph of an output: by a second backward pass, or by the rows of J.

Both need reverse mode alone. The first differentiates Jᵀu with respect to u, and so needs operations that can be
differentiated twice; the second takes a backward pass for every output, and serves every model that has a gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from curvalg.errors import ProblemError, StaleError
from curvalg.problem.model_call import ModelCall
from curvalg.problem.verification.tangent_checks import TangentNotes, random_cotangent, random_directions, wrong_tangent
from curvalg.problem.verification.verdicts import verdict
from curvalg.tensors.backward import backward, backward_columns

MOST_BYTES = 2**30
"""Memory that the rows of J may take."""


class TwiceBackward:
    """Tangents J v as the derivative of G = Jᵀu with respect to u, in which it is linear.

    u is random: some operations have no right second derivative where a cotangent is zero.
    """

    NAME = "two backward passes"

    def __init__(
        self, evaluation: ModelCall, z: Tensor, leaves: Sequence[Tensor], cotangent: Tensor | None = None
    ) -> None:
        self.u = (random_cotangent(z.detach()) if cotangent is None else cotangent).requires_grad_()
        self.gradients = evaluation.differentiate(z, leaves, self.u)

    def held(self) -> list[Tensor]:
        """The tensors that it keeps besides graphs."""
        return []

    def over(self, places: Sequence[int]) -> TwiceBackward:
        """The same tangents for some of the parameters."""
        twin = copy.copy(self)
        twin.gradients = [self.gradients[i] for i in places]
        return twin

    def push(self, directions: Sequence[Tensor], *, batched: bool = False) -> Tensor:
        """Tangents J v for one direction by parameter, or with a leading column axis."""

        (t,) = backward(self.gradients, [self.u], directions, retain_graph=True, batched=batched)
        columns = directions[0].shape[:1] if batched else ()
        return self.u.new_zeros(*columns, *self.u.shape) if t is None else t


class Rows:
    """Tangents by J itself, a backward pass for each of its rows."""

    NAME = "the rows of J"

    def __init__(self, evaluation: ModelCall, z: Tensor, leaves: Sequence[Tensor]) -> None:

        nbytes = z.numel() * sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        if nbytes > MOST_BYTES:
            raise ProblemError(f"J has {z.numel()} rows and takes {nbytes / 2**30:.1f} GiB; use smaller batches")
        self.shape = z.shape
        self.gradients: list[Tensor | None] = [None] * len(leaves)
        unit = torch.eye(z.numel(), dtype=z.dtype, device=z.device).reshape(-1, *z.shape)
        found, _ = backward_columns(z, leaves, unit, batched=False)
        self.rows = [None if g is None else g.detach().reshape(z.numel(), -1) for g in found]

    def held(self) -> list[Tensor]:
        """The tensors that it keeps besides graphs."""
        return [rows for rows in self.rows if rows is not None]

    def over(self, places: Sequence[int]) -> Rows:
        """The same tangents for some of the parameters."""
        twin = copy.copy(self)
        twin.rows, twin.gradients = [self.rows[i] for i in places], [None] * len(places)
        return twin

    def push(self, directions: Sequence[Tensor], *, batched: bool = False) -> Tensor:
        """Tangents J v for one direction by parameter, or with a leading column axis."""
        columns = directions[0].shape[0] if batched else 1
        total: Tensor | None = None
        for rows, v in zip(self.rows, directions, strict=True):
            if rows is not None:
                part = v.reshape(columns, -1) @ rows.T
                total = part if total is None else total + part
        if total is None:  # the output does not depend on any of them
            total = directions[0].new_zeros(columns, self.shape.numel())
        return total.reshape(*((columns,) if batched else ()), *self.shape)


def reverse_tangents(evaluation: ModelCall, z: Tensor, leaves: Sequence[Tensor]) -> TwiceBackward | Rows:
    """The first of the two that is right on this model.

    Raises:
        ProblemError: none is; says why.
    """
    return twice_backward(evaluation, z, leaves) or rows(evaluation, z, leaves)


def twice_backward(evaluation: ModelCall, z: Tensor, leaves: Sequence[Tensor]) -> TwiceBackward | None:
    """Tangents by a second backward pass, or None where they are wrong or cannot be taken."""
    notes = evaluation.problem.noted(TangentNotes)
    if notes.no_double_backward is not None:
        return None
    found = _sworn(TwiceBackward, evaluation, z, leaves)
    if isinstance(found, str):
        notes.no_double_backward = found
        return None
    assert isinstance(found, TwiceBackward)
    return found


def rows(evaluation: ModelCall, z: Tensor, leaves: Sequence[Tensor]) -> Rows:
    """Tangents by the rows of J.

    Raises:
        ProblemError: the last way is wrong too.
    """
    notes = evaluation.problem.noted(TangentNotes)
    found = _sworn(Rows, evaluation, z, leaves)
    if isinstance(found, str):
        raise ProblemError(
            f"no way to tangents J v is right on this model. Forward AD: {notes.no_forward_ad or 'not tried'}. Two backward "
            f"passes: {notes.no_double_backward}. The rows of J by backward passes: {found}. If a tensor hook, a module hook "
            "or a custom autograd Function alters the gradient, so that it is the derivative of nothing, take it off"
        )
    assert isinstance(found, Rows)
    return found


def _sworn(
    kind: type[TwiceBackward] | type[Rows], evaluation: ModelCall, z: Tensor, leaves: Sequence[Tensor]
) -> TwiceBackward | Rows | str:
    """The route, or why it must not be used."""
    try:
        route = kind(evaluation, z, leaves)
    except StaleError:
        raise
    except _FAILURES as error:
        return _first_line(error)
    reason = verdict(evaluation, kind.NAME, lambda: oath(evaluation, route, z, leaves), [z])
    return route if reason is None else reason


_FAILURES = (ProblemError, RuntimeError, NotImplementedError)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def oath(evaluation: ModelCall, route: TwiceBackward | Rows, z: Tensor, leaves: Sequence[Tensor]) -> str | None:
    """Why the tangents of a route must not be used, or None."""

    v = random_directions(evaluation)
    if isinstance(route, TwiceBackward):  # G is the gradient of this u already
        u, gradients = route.u.detach(), route.gradients
    else:
        u = random_cotangent(z.detach(), seed=3)
        gradients = backward([z], leaves, [u], retain_graph=True)
    try:
        tangent = route.push(v)
    except StaleError:
        raise
    except _FAILURES as error:
        return _first_line(error)
    return wrong_tangent(evaluation, z, u, tangent, gradients, v)
