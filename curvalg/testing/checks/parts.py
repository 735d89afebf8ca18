"""Parts of a term: sub-matrices, diagonal blocks, and the factor it gives."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.errors import LossError
from curvalg.expr import block_diagonal, restrict
from curvalg.expr.term import Term
from curvalg.lowering.sweeps.sweep import defines
from curvalg.testing.outcome import Failure, NotApplicable, require_close
from curvalg.testing.subject import Case, on_problems
from curvalg.testing.variants import batches, jacobian

_LOCAL = (
    "Inside a restriction a term sees only the chosen parameters (vectors, batch.vjp, prepared statistics, layout): it must "
    "not use the size or the positions of all, nor a norm over them"
)


def _positions(case: Case, names: list[str]) -> Tensor:
    flat = torch.arange(case.problem.size, device=case.problem.device)
    return torch.cat([flat[case.problem.layout.slices[name]] for name in names])


@on_problems
def restriction(case: Case) -> None:
    """The sub-matrix restrict(term, params) has the entries of the matrix over these parameters."""
    if not case.unrestricted:
        raise NotApplicable("the term is not over all parameters")
    names = case.problem.layout.names
    chosen = list(dict.fromkeys((names[0], names[-1])))  # apart from each other, where there are three or more
    at = _positions(case, chosen)
    part = case.matrix[at] if case.term.codomain == "parameters" else case.matrix
    part = part[:, at] if case.term.domain == "parameters" else part
    require_close(
        case.dense(restrict(case.term, chosen)),
        part,
        what=f"restrict(term, {chosen}) to be the sub-matrix",
        cure=_LOCAL,
        scale=case.matrix.double().norm(),
    )


@on_problems
def blocks(case: Case) -> None:
    """The blocks of block_diagonal(term) are the diagonal blocks of the matrix."""
    if not (case.unrestricted and case.square):
        raise NotApplicable("only a matrix over all parameters has diagonal blocks")
    expected = torch.zeros_like(case.matrix)
    for at in case.problem.layout.slices.values():
        expected[at, at] = case.matrix[at, at]
    got = case.dense(block_diagonal(case.term))
    require_close(got, expected, what="block_diagonal(term) to have the diagonal blocks of the matrix", cure=_LOCAL)


@on_problems
def factor(case: Case) -> None:
    """The columns of Term.factor make the matrix: Σ (Jᵀs)(Jᵀs)ᵀ, less their mean where the term is centred."""
    term = case.term
    if not isinstance(term, Term) or not defines(term, "factor"):
        raise NotApplicable("the term gives no factor")
    rows = jacobian(case.problem)
    columns: list[Tensor] = []
    count, at = 1, 0
    with batches(case.problem) as found:
        for batch in found:
            try:
                s = term.factor(batch)
            except LossError as reason:
                raise NotApplicable(str(reason)) from reason
            if s is None:
                raise NotApplicable("the term gives no factor on this problem")
            if s.ndim != batch.output.ndim + 1 or s.shape[1:] != batch.output.shape:
                raise Failure(
                    f"factor(batch) of shape (columns, {', '.join(map(str, batch.output.shape))})",
                    f"{tuple(s.shape)}",
                    "Return one column after the other, each of the output's shape",
                )
            if (said := term.factor_columns(batch)) != s.shape[0]:
                raise Failure(f"factor_columns(batch) = {s.shape[0]}, as factor gives", f"{said}", "Count them alike")
            n, numbers = batch.output.shape[0], batch.output.numel()
            J = rows[at : at + numbers].reshape(n, numbers // n, -1)
            columns.append(torch.einsum("kno,nod->dkn", s.reshape(len(s), n, -1), J).flatten(1))
            count, at = batch.count, at + numbers
    V = torch.cat(columns, 1)
    mean = V.sum(1)
    gram = V @ V.T - torch.outer(mean, mean) / count if term.centred else V @ V.T
    require_close(
        gram,
        case.matrix,
        what="Σ over rows and columns of (Jᵀs)(Jᵀs)ᵀ to be the matrix",
        cure="Columns carry the square root of what cotangent_dot applies: u̇ = Σ s (sᵀż), row by row; set centred=True "
        "where N means are to be taken off",
        scale=case.matrix.double().norm(),
    )
