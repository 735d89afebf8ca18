"""Terms give the same numbers however they are executed: fused, fresh or kept, column by column or batched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvalg.expr import GGN, Expr, Hessian, LossHessian, restrict
from curvalg.expr.term import DatasetTerm, Term
from curvalg.problem import Batch
from curvalg.problem.large_outputs.find_head import HeadNotes
from curvalg.tensors import trees
from curvalg.tensors.columns import mapped
from curvalg.tensors.random_numbers import normals
from curvalg.testing.outcome import Failure, NotApplicable, require_close
from curvalg.testing.subject import COLUMNS, Case, on_problems
from curvalg.testing.variants import batches, counted, variant


def _companions(case: Case) -> list[Expr]:
    """Other matrices between the same spaces, to be fused with."""
    if case.problem.loss is None or not case.square:
        raise NotApplicable("there is no other matrix between these spaces to fuse with")
    if case.term.domain == "outputs":
        return [LossHessian()]
    params = case.term.domain_params
    return [other if params is None else restrict(other, params) for other in (Hessian(), GGN())]


@on_problems
def fusion(case: Case) -> None:
    """The matrix of one operator with other terms is the sum of the separate ones."""
    others = _companions(case)
    fused, separate = 2 * case.term, 2 * case.matrix
    for other in others:
        fused, separate = fused + other / 3, separate + case.dense(other) / 3
    require_close(
        case.dense(fused),
        separate,
        what=f"{fused} to be the sum of its separate parts",
        cure="Terms of a sum share the batch and the tangent: never write into either in place, and keep no state",
    )


@on_problems
def model_calls(case: Case) -> None:
    """A one-pass term, fused with others and nothing kept, costs one model call per batch and product."""
    if not isinstance(case.term, Term) or isinstance(case.term, DatasetTerm):
        raise NotApplicable("only a Term is a single pass")
    problem, calls = counted(case.problem, cache=0)
    expr: Expr = case.term
    for other in _companions(case):
        expr = expr + other / 3
    op = expr.lower(problem)
    v = case.vectors(1)[:, 0]
    _ = op @ v  # the first product also finds out what the model does with its inputs
    before, number = calls(), len(list(problem.data.read(problem.device)))
    _ = op @ v
    if (made := calls() - before) != number:
        raise Failure(
            f"{number} model calls for a product over {number} batches",
            f"{made}",
            "Compute with the batch's output, loss_gradient and loss_hvp. What needs per-sample gradients or batch.vjp "
            "belongs into DatasetTerm.prepare, which runs once and is kept",
        )


@on_problems
def columns(case: Case) -> None:
    """Several columns at once give the same as one after the other, and the methods run under torch.func.vmap."""
    vectors = case.vectors(3)
    together = case.term.lower(variant(case.problem, columns=3)) @ vectors
    op = case.term.lower(variant(case.problem, columns="loop"))
    single = torch.stack([op @ v for v in vectors.T], 1)
    require_close(
        together, single, what="A [v w] = [A v, A w]", cure="Let no column see another: use no batch axis but 0"
    )
    if isinstance(case.term, DatasetTerm):
        _batched_dataset_term(case, case.term, vectors.T)
    elif isinstance(case.term, Term):
        with batches(case.problem) as found:
            for batch in found:
                _batched("cotangent_dot", partial(case.term.cotangent_dot, batch), _tangents(batch))


def _tangents(batch: Batch, number: int = 3) -> Tensor:
    return normals((number, *batch.output.shape), 0).to(batch.output)


def _batched_dataset_term(case: Case, term: DatasetTerm, rows: Tensor) -> None:
    with batches(case.problem) as found:
        prepared: Any = None
        for batch in found:
            prepared = trees.add(prepared, term.prepare(batch))
        totals = _batched("project", lambda v: term.project(v, prepared), rows)
        for batch in found:
            part = _batched("reduce", partial(term.reduce, batch, prepared=prepared), _tangents(batch))
            totals = trees.add(totals, part)
        for batch in found:

            def rate(t: Tensor, given: Any, batch: Batch = batch) -> Any:
                return term.cotangent_dot(batch, t, prepared, given)

            _batched("cotangent_dot", rate, _tangents(batch), totals)


def _batched(method: str, function: Callable[..., Any], *operands: Any) -> Any:
    """The function over the leading axis of its operands, by vmap and one by one, which must agree."""
    number = operands[0].shape[0]
    if function(*(_column(operand, 0) for operand in operands)) is None:
        return None
    cure = (
        "Write it in torch operations that vmap can batch: no .item(), .numpy() or `if` on values, no random numbers, no "
        "in-place writes into fresh tensors"
    )
    try:
        together = mapped(function, *operands)
    except Exception as error:  # vmap and what is called under it raise many kinds
        first = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
        raise Failure(f"{method} to run under torch.func.vmap", f"{type(error).__name__}: {first}", cure) from error
    for column in range(number):
        one = function(*(_column(operand, column) for operand in operands))
        for a, b in zip(trees.tensors(together), trees.tensors(one), strict=True):
            scale = torch.stack([t.double().norm() for t in trees.tensors(together)]).norm()
            require_close(a[column], b, what=f"{method} to give the same under vmap as alone", cure=cure, scale=scale)
    return together


def _column(tree: Any, column: int) -> Any:
    return trees.tensor_map(lambda t: t[column], tree)


@on_problems
def kept(case: Case) -> None:
    """Three products with recordings that are kept equal three that record anew, and each other."""
    v = case.vectors(1)[:, 0]
    scale = case.matrix.double().norm() * v.double().norm()
    fresh, held = (case.term.lower(variant(case.problem, cache=cache)) for cache in (0, 2**30))
    first = held @ v
    for number in range(1, 4):
        for how, op in (("made anew (cache=0)", fresh), ("with what is kept", held)):
            require_close(
                op @ v,
                first,
                what=f"product {number}, {how}, to equal the first one",
                cure="Keep no state in the class, the instance or the module; what must be computed once belongs into "
                "prepare(), and random numbers come from batch.pseudo_gradients",
                scale=scale,
            )


@on_problems
def chunks(case: Case) -> None:
    """A term that declares what it acts on gives the same where outputs are taken one position after the other."""
    if not isinstance(case.term, Term) or case.term.acts_on == "batch":
        raise NotApplicable("the term does not say that it acts on positions or samples")
    twin = variant(case.problem, cache=0, columns=COLUMNS, output_memory=0)
    matrix = case.term.lower(twin).to_dense()
    if not twin.noted(HeadNotes).found:
        raise NotApplicable("the model's outputs are not those of a linear layer, or the loss is not one of classes")
    require_close(
        matrix,
        case.matrix,
        what="the product to be the same position by position as on the whole outputs",
        cure=f"acts_on = {case.term.acts_on!r} is a promise: 'positions' where u and u̇ come from loss_hvp, loss_gradient and "
        "such alone; 'samples' with batch.dot; else leave it out",
    )
