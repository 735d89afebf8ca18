"""The check that a call of the model computes one function of the tensors that stand for its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from curvalg.errors import LossError, ProblemError
from curvalg.losses.callable import CallablePoint
from curvalg.problem.model.model import Model
from curvalg.problem.model_call import ModelCall
from curvalg.problem.verification.verdicts import FAILURES, few_rows, rounding
from curvalg.tensors.graph import nodes


@contextmanager
def owned(evaluation: ModelCall) -> Iterator[None]:
    """A context around the first recorded call in which live parameters require gradients, so that graphs show them."""
    problem, sworn = evaluation.problem, evaluation.snapshot.structure.found.sworn
    if not problem.compares or "graph" in sworn:
        yield
        return
    frozen = [p for p in problem.model.live.values() if p.is_leaf and not p.requires_grad and not p.is_inference()]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def swear_graph(evaluation: ModelCall, z: Tensor, leaves: Sequence[Tensor]) -> None:
    """Check once a structure that the output depends on the tensors for the parameters, not on the live ones.

    Raises:
        ProblemError: a parameter is reached in a way that its exchange does not.
    """
    problem, sworn = evaluation.problem, evaluation.snapshot.structure.found.sworn
    if not problem.compares or "graph" in sworn:
        return
    rounding(evaluation, z)  # the graph shows the dtypes that the model computes in
    live = {id(p): name for name, p in problem.model.live.items()}
    given = {id(leaf) for leaf in leaves}
    reached = {id(v) for node in nodes([z]) if (v := getattr(node, "variable", None)) is not None}
    if not reached & given:
        return  # it depends on none of them, which is reported elsewhere
    for key, name in live.items():
        if key in reached - given:
            raise ProblemError(
                f"the parameter {name!r} reaches the output in a way that curvalg cannot follow: through a closure, a list, a "
                "cached tensor or a hook, not as an attribute of its module. Read it as an attribute (self.weight) in forward, "
                "or leave it out by params="
            )
    sworn.add("graph")


def swear_output(evaluation: ModelCall, z: Tensor, earlier: Tensor | None = None) -> None:
    """Check once a structure that two calls give the same output, the second of the user's own module.

    Args:
        evaluation: of the batch.
        z: the output.
        earlier: that of another call, which saves the second.

    Raises:
        ProblemError: it does not.
    """
    problem, sworn = evaluation.problem, evaluation.snapshot.structure.found.sworn
    if not problem.compares or "output" in sworn:
        return
    sworn.add("output")
    tolerance = rounding(evaluation, z)
    try:
        if earlier is None and not problem.group.sharded and _same_few_rows(evaluation, z, tolerance):
            return
        again = evaluation.live_output() if earlier is None else earlier
        if z.shape != again.shape or not _close(z, again, tolerance):
            raise ProblemError(
                f"the model's output on batch {evaluation.sample.index} is not the same in every call, so that there is no one "
                "matrix: it draws random numbers from a generator of its own (pass its numbers as data, or switch it off), "
                "keeps a state that its forward changes (register it as a buffer), or reads its parameters otherwise than as "
                "attributes of their modules. Problem(verify=False) leaves this check out"
            )
    except BaseException:
        sworn.discard("output")
        raise


def _same_few_rows(evaluation: ModelCall, z: Tensor, tolerance: float) -> bool:
    """Whether the live model gives the first rows of the output, where these can be computed alone: most of a call is saved."""
    few = few_rows(evaluation)
    if few is evaluation or z.shape[:1] != (evaluation.sample.rows,):
        return False
    try:
        again = few.live_output()
    except FAILURES:  # a model that takes batches of one size
        return False
    first = z[: few.sample.rows]
    return first.shape == again.shape and _close(first, again, tolerance)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = torch.where(a.isfinite(), a, 0).abs().max() if a.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0.0, atol=float(tolerance * scale), equal_nan=True))


def swear_loss(model: Model, point: CallablePoint) -> None:
    """Check that the user's loss depends on the parameters through the output alone.

    Raises:
        ProblemError: it does not.
    """
    live = {id(p): name for name, p in model.live.items()}
    for node in nodes([point.numerator]):
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in live:
            raise LossError(
                f"the loss depends on the parameters ({live[id(variable)]!r}) otherwise than through the model's output, as a "
                "penalty does; its derivatives there would be missing. Take the penalty out of the loss, and add its curvature "
                "to the expression: for c ‖θ‖² it is + 2*c * Identity"
            )
