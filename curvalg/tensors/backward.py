"""Backward passes through autograd graphs, with the causes of known failures and their cures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvalg.errors import GroupError, ProblemError, StaleError
from curvalg.tensors.clock import timed


def backward(
    outputs: Sequence[Tensor | GradientEdge | None],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
    batched: bool = False,
) -> list[Tensor | None]:
    """Sum Σ cotangentᵀ ∂outputs/∂inputs; None or constant outputs count as zero, edges stand for tensors that are gone.

    With ``batched`` all cotangents have a leading axis, and so do the results.

    Raises:
        ProblemError: autograd fails for a known reason that has a cure.
    """
    given = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None]
    live = [(o, c) for o, c in given if isinstance(o, GradientEdge) or o.requires_grad]
    if not live:
        return [None] * len(inputs)
    try:
        return list(
            torch.autograd.grad(
                [o for o, _ in live],  # type: ignore[arg-type]
                tuple(inputs),  # type: ignore[arg-type]
                [c if isinstance(o, GradientEdge) else c.to(o.dtype) for o, c in live],
                create_graph=create_graph,
                retain_graph=retain_graph,
                allow_unused=True,
                is_grads_batched=batched,
            )
        )
    except RuntimeError as error:
        _refuse_known(error)
        raise


def backward_from(
    edge: GradientEdge, inputs: Sequence[Tensor], cotangent: Tensor, *, retain_graph: bool
) -> list[Tensor | None]:
    """The product cotangentᵀ ∂/∂inputs of the tensor whose gradient arrives at an edge.

    Raises:
        ProblemError: autograd fails for a known reason that has a cure.
    """
    try:
        return list(torch.autograd.grad(edge, tuple(inputs), cotangent, retain_graph=retain_graph, allow_unused=True))
    except RuntimeError as error:
        _refuse_known(error)
        raise


def _refuse_known(error: RuntimeError) -> None:
    """Raise an error that says what to do where autograd fails for a known reason.

    Raises:
        StaleError: a tensor that a graph needs was changed in place.
        ProblemError: another reason that has a cure.
    """
    if "modified by an inplace operation" in str(error):
        raise StaleError(
            "a tensor that a backward pass needs was changed in place. Where loss(model(X), y).backward() fails as well, "
            "the model's forward does that: write t * 2 instead of t.mul_(2) there, or inplace=False. Otherwise it was "
            "changed after the operator was lowered (the data, or a plain attribute of the model): call problem.close() "
            "and operator.refresh(), or pass cache=0"
        ) from error
    if cure := explain_failure(error):
        raise ProblemError(f"{cure} ({str(error).strip().splitlines()[0]})") from error


def backward_columns(
    z: Tensor, inputs: Sequence[Tensor] | Sequence[GradientEdge], cotangents: Tensor, *, batched: bool | None = None
) -> tuple[list[Tensor | None], bool]:
    """Products Jᵀs for cotangents (K, *z.shape), each result with a leading axis of length K; the graph stays.

    Args:
        z: the output.
        inputs: what to differentiate with respect to.
        cotangents: s.
        batched: one backward pass for all columns, or one after the other; None: whichever is faster, measured here.

    Returns:
        The results, and whether columns are better batched.
    """

    def one(c: Tensor) -> list[Tensor | None]:
        return backward([z], inputs, [c], retain_graph=True)

    first: list[list[Tensor | None]] = []
    single = 0.0
    if batched is None and len(cotangents) > 1:
        single, found = timed(lambda: one(cotangents[0]), z.device)
        first = [found]
        # Batching saves calls, no arithmetic: where a column is real work there is nothing to gain (and vmap copies).
        batched = None if single < OVERHEAD else False
    if batched is not False and len(cotangents) > 1:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                seconds, found = timed(
                    lambda: backward([z], inputs, [cotangents], retain_graph=True, batched=True), z.device
                )
            return found, batched is True or seconds < len(cotangents) * single
        except GroupError:  # of an exchange on the way back, which all processes know of
            raise
        except (RuntimeError, NotImplementedError, ProblemError):
            pass  # whatever is wrong beyond batching is raised below
    columns = zip(*(first + [one(c) for c in cotangents[len(first) :]]), strict=True)
    return [torch.stack(some) if (some := [g for g in column if g is not None]) else None for column in columns], False


OVERHEAD = 2e-3
"""Seconds of a backward pass above which it is work rather than calls."""


def explain_failure(error: Exception) -> str | None:
    """A cure for failures of autograd that are known, else None."""
    message = str(error)
    for part, cure in _KNOWN_FAILURES.items():
        if part in message:
            return cure
    return None


REENTRANT = "None of the inputs have requires_grad=True"
_OF_TYPES = "model and data have different dtypes; convert one of them, as by X.to(next(model.parameters()).dtype)"
_OF_MEMORY = (
    "there is not enough memory; use smaller batches, whose products are added up to the same numbers, or keep less between "
    "products with Problem(cache=...)"
)
_KNOWN_FAILURES: dict[str, str] = {
    REENTRANT: (
        "reentrant activation checkpointing drops the parameters inside it here; use "
        "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
    ),
    "Checkpointing is not compatible with .grad()": (
        "reentrant activation checkpointing cannot be differentiated twice; use torch.utils.checkpoint.checkpoint(..., "
        "use_reentrant=False)"
    ),
    "use_reentrant": (
        "reentrant activation checkpointing cannot be differentiated twice; use torch.utils.checkpoint.checkpoint(..., "
        "use_reentrant=False)"
    ),
    "have the same dtype": _OF_TYPES,
    "type (double) and": _OF_TYPES,
    "type (float) and": _OF_TYPES,
    "not enough memory": _OF_MEMORY,
    "out of memory": _OF_MEMORY,
    "_thnn_fused": "a fused recurrent layer cannot be differentiated twice on this device",
    "is not implemented for": "an operation of the model lacks a second derivative; replace it by one that has it",
    "double backward": "an operation of the model lacks a second derivative; replace it by one that has it",
    "derivative for": "an operation of the model lacks a second derivative; replace it by one that has it",
}
