"""Terms do not depend on how the data come, and touch nothing that is the user's."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvalg.errors import CurvalgError, VectorError
from curvalg.expr.term import DatasetTerm, Term
from curvalg.problem import Problem
from curvalg.tensors import trees
from curvalg.testing.outcome import Failure, require_close
from curvalg.testing.problems import UNSUITABLE, make
from curvalg.testing.subject import COLUMNS, Case, Subject, on_problems
from curvalg.testing.variants import batches, in_dtype, rebatched, variant


@on_problems
def batch_split(case: Case) -> None:
    """Samples in the same order give the same matrix, in whatever batches."""
    rows = case.problem.totals.rows
    for sizes in ([rows], [1, 2]):
        twin = rebatched(case.problem, sizes)
        twin.columns = COLUMNS
        require_close(
            case.term.lower(twin).to_dense(),
            case.matrix,
            what=f"the same matrix with batches of {' and '.join(map(str, sizes))} rows",
            cure="Add over batches and never divide by a batch's size: batch.weights, loss_gradient and scale carry the "
            "share in the whole data set, batch.count is the number of all samples",
        )


@on_problems
def mutation(case: Case) -> None:
    """Parameters, gradients, buffers, flags, hooks, data, random state and the batch are left as they were."""
    twin = copy.deepcopy(case.problem)
    for number, (_, owner, key) in enumerate(twin.model.slots()):
        if number % 2 and owner[key].requires_grad:
            owner[key].grad = torch.ones_like(owner[key])
    before = _state(twin)
    for transposed in (False, case.transpose is not None):
        op = (case.term.T if transposed else case.term).lower(twin)
        _ = op @ case.vectors(2, rows=op.shape[1])
    for what, now in _state(twin).items():
        if what not in before or not _same(before[what], now):
            raise Failure(
                "products that change nothing of the user's",
                f"another {what} than before",
                "Clone before writing in place, remove what you register, and use batch.pseudo_gradients for randomness",
            )
    if isinstance(case.term, Term):
        _batch_untouched(case)


def _state(problem: Problem) -> dict[str, Any]:
    """Everything of the user's that must not change, by its name in messages."""
    state: dict[str, Any] = {}
    for name, owner, key in problem.slots():
        t = owner[key]
        state[f"value of {name!r}"] = t.detach().clone()
        state[f"gradient of {name!r}"] = None if t.grad is None else t.grad.clone()
        state[f"requires_grad of {name!r}"] = t.requires_grad
    for number, (_, module) in enumerate(problem.model.named_modules()):
        kind = f"module {number} ({type(module).__name__})"
        state[f"training flag of {kind}"] = module.training
        state[f"set of attributes of {kind}"] = sorted(vars(module))
        hooks = {name: list(held) for name, held in vars(module).items() if name.endswith("_hooks") and held}
        state[f"set of hooks of {kind}"] = hooks
    if problem.data.fixed:
        state["data"] = [t.clone() for t in trees.tensors(problem.data.source)]
    state["random state of torch"] = torch.get_rng_state()
    state["random state of NumPy"] = pickle.dumps(np.random.get_state())
    state["random state of Python"] = random.getstate()
    return state


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, list) and left and isinstance(left[0], Tensor):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


def _batch_untouched(case: Case) -> None:
    term = case.term
    assert isinstance(term, Term)
    with batches(case.problem) as found:
        for batch in found:
            held = [batch.output, *trees.tensors(batch.target)]
            held += [] if case.problem.loss is None else [batch.loss_gradient]
            tangent = torch.ones_like(batch.output)
            before = trees.versions([*held, tangent])
            term.cotangent(batch)
            if not isinstance(term, DatasetTerm):
                term.cotangent_dot(batch, tangent)
            if trees.versions([*held, tangent]) != before:
                raise Failure(
                    "cotangent and cotangent_dot to leave batch and tangent alone, which other terms of a sum share",
                    "an in-place write into one of them",
                    "Write a * b, not a.mul_(b) or a *= b",
                )


@on_problems
def dtypes(case: Case) -> None:
    """Products are computed in the problem's precision, and single precision comes close to double precision."""
    here = case.problem.dtype
    other = torch.float32 if here == torch.float64 else torch.float64
    if isinstance(case.term, Term) and not isinstance(case.term, DatasetTerm):
        _rates_keep_dtype(case.term, case.problem)
    twin = in_dtype(case.problem, other)
    twin.columns = COLUMNS
    got = case.term.lower(twin).to_dense()
    if got.dtype != other:
        raise Failure(f"a matrix in {other} on a problem in {other}", f"{got.dtype}", "Make constants like the output")
    require_close(
        got,
        case.matrix,
        what=f"nearly the same matrix in {other} as in {here}",
        cure="Keep numbers within the range of single precision (1e-38 to 1e38), and use no constants of a fixed dtype",
        rtol=5e-3,
    )


def _rates_keep_dtype(term: Term, problem: Problem) -> None:
    with batches(problem) as found:
        for batch in found[:1]:
            rate = term.cotangent_dot(batch, torch.ones_like(batch.output))
            for method, got in (("cotangent", term.cotangent(batch)), ("cotangent_dot", rate)):
                if got is not None and got.dtype != batch.output.dtype:
                    raise Failure(
                        f"{method} in the output's dtype, {batch.output.dtype}",
                        f"{got.dtype}",
                        "Do not cast; make constants with torch.full_like or plain Python numbers",
                    )


def errors(subject: Subject) -> None:
    """A loss or problem that the term cannot be computed for is refused with an error of curvalg's own."""
    for name, maker in UNSUITABLE.items():
        problem = make(maker)
        try:
            op = subject.term.lower(problem)
            _ = op @ torch.ones(op.shape[1], dtype=problem.dtype, device=problem.device)
        except CurvalgError:
            continue
        except Exception as error:  # any other kind is the failure
            raise Failure(
                f"a product, or an error of curvalg, on a problem with {name}",
                f"{type(error).__name__}: {error}",
                "Override validate(loss), where loss is None if there is none, and raise curvalg.LossError",
            ) from error
    for case in subject.cases[:1]:
        _wrong_lengths(lambda case=case: case.term.lower(variant(case.problem)))  # type: ignore[misc]


def _wrong_lengths(lower: Callable[[], Any]) -> None:
    op = lower()
    for wrong in (torch.ones(op.shape[1] + 1, device=op.device), np.ones((op.shape[1] + 1, 2))):
        try:
            op @ wrong
        except VectorError:
            continue
        except Exception as error:
            raise Failure("VectorError for a vector that is too long", type(error).__name__, "Report it") from error
        raise Failure("VectorError for a vector that is too long", "a product", "Give the term its domain")
