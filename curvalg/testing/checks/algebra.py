"""Terms are matrices: linear, with the transpose, the facts and the laws that they claim."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.expr import Expr, Identity, restrict
from curvalg.lowering import CurvatureOperator
from curvalg.rewrite import simplify
from curvalg.testing.outcome import RTOL, Failure, NotApplicable, require_close
from curvalg.testing.subject import Case, on_problems

_SYMMETRIC = (
    "Let facts() say symmetric=True only where cotangent_dot is a symmetric map of the tangent: a weight stands on both sides "
    "of an outer product, w^½ s (w^½ s)ᵀ, inside batch.dot as well as outside. (The residual part that u makes is symmetric "
    "by itself.)"
)


def _lower(case: Case, expr: Expr | None = None) -> CurvatureOperator:
    return (case.term if expr is None else expr).lower(case.keeping)


@on_problems
def products(case: Case) -> None:
    """The term can be lowered and multiplied: right shapes, the problem's precision, finite, the operand's kind."""
    op = _lower(case)
    v = case.vectors(2, rows=op.shape[1])
    product, array = op @ v, op @ v[:, 0].cpu().numpy()
    if product.shape != (op.shape[0], 2) or array.shape != (op.shape[0],):
        raise Failure(f"products of length {op.shape[0]}", f"shape {tuple(product.shape)}", "Return u̇ like the output")
    if product.dtype != case.problem.dtype or array.dtype != op.dtype:
        raise Failure(
            f"products in {case.problem.dtype}", f"{product.dtype}", "Make constants like the batch's tensors"
        )
    if not bool(torch.isfinite(product).all()):
        raise Failure("finite products", "NaN or infinite entries", "Guard divisions and logarithms against zero")


@on_problems
def linearity(case: Case) -> None:
    """The product is linear: A (2v - 3w) = 2 A v - 3 A w, and A 0 = 0."""
    op, vectors = _lower(case), case.vectors(2)
    v, w = vectors[:, 0], vectors[:, 1]
    separate = 2 * (op @ v) - 3 * (op @ w)
    cure = "Make cotangent_dot (and project, reduce) linear: no squares, absolute values, thresholds or added constants"
    scale = case.matrix.double().norm() * vectors.double().norm()
    require_close(op @ (2 * v - 3 * w), separate, what="A (2v - 3w) = 2 A v - 3 A w", cure=cure, scale=scale)
    require_close(op @ (0 * v), 0 * separate, what="A 0 = 0", cure=cure, scale=scale)


@on_problems
def adjoint(case: Case) -> None:
    """The transpose is right: uᵀ(A v) = (Aᵀu)ᵀv, and uᵀ(A v) = (A u)ᵀv where the facts say symmetric."""
    matrix = case.matrix.double()
    facts = case.term.facts(case.problem.facts)
    if case.square and facts.symmetric:
        require_close(matrix, matrix.T, what="a symmetric matrix, as the facts say", cure=_SYMMETRIC, rtol=_rtol(case))
    transposed = case.transpose
    if transposed is None:
        _explain_missing_transpose(case)
    assert transposed is not None
    u, v = case.vectors(1, 1, matrix.shape[0])[:, 0], case.vectors(1, 2)[:, 0]
    forward, backward = _lower(case) @ v, _lower(case, case.term.T) @ u
    require_close(
        torch.dot(backward, v),
        torch.dot(u, forward),
        what="(Aᵀu)ᵀv = uᵀ(A v)",
        cure="The transpose is made by differentiating cotangent_dot (and reduce): no .detach(), .data or no_grad in them",
        scale=matrix.norm() * u.double().norm() * v.double().norm(),
    )
    require_close(
        transposed, matrix.T, what="the matrix of term.T to be the transpose", cure=_SYMMETRIC, rtol=_rtol(case)
    )


def _explain_missing_transpose(case: Case) -> None:
    matrix = case.matrix.double()
    if case.square and float((matrix - matrix.T).norm()) <= _rtol(case) * float(matrix.norm()):
        raise Failure(
            "a transpose, since the matrix is symmetric here",
            "an error, since a term with project() is transposed only if it is known to be symmetric",
            "If it always is, let facts() say so: Facts(symmetric=True)",
        )
    raise NotApplicable("the term has no transpose: it defines project() and is not symmetric")


def _rtol(case: Case) -> float:
    return RTOL.get(case.problem.dtype, 5e-2)


@on_problems
def dense(case: Case) -> None:
    """The products give the matrix that ``dense=`` gives."""
    if case.reference is None:
        raise NotApplicable("no dense= was given")
    require_close(
        case.matrix,
        case.reference(case.problem),
        what="the matrix that dense=... gives",
        cure="Compare shares (class weights, ignored targets, the denominator of all data) and the scale s on both sides",
    )


@on_problems
def facts(case: Case) -> None:
    """The claims of facts() hold: symmetry, and definiteness by the least eigenvalue."""
    if not case.square:
        raise NotApplicable("facts are of square matrices")
    loss = case.problem.facts
    claimed, always = case.term.facts(loss), case.term.facts(None)
    for name in ("symmetric", "psd", "positive_definite"):
        if getattr(always, name) is True and getattr(claimed, name) is not True:
            raise Failure(
                f"{name}=True for this loss, as for any loss (facts(None))",
                f"{getattr(claimed, name)}",
                "What facts(None) says must hold for every loss; say None there",
            )
    matrix = case.matrix.double()
    if claimed.symmetric:
        require_close(matrix, matrix.T, what="a symmetric matrix, as the facts say", cure=_SYMMETRIC, rtol=_rtol(case))
    if not claimed.psd:
        return
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    least, largest = float(values.min()), float(values.abs().max())
    if least < -_rtol(case) * largest:
        raise Failure(
            "no negative eigenvalue, as psd=True says",
            f"{least:.3g} (the largest in magnitude is {largest:.3g})",
            "Say psd=None, or only where the loss makes it so (loss is not None and loss.convex)",
        )
    if claimed.positive_definite and least <= torch.finfo(case.problem.dtype).eps * largest:
        raise Failure(
            "only positive eigenvalues, as positive_definite=True says",
            f"{least:.3g} (the largest is {largest:.3g})",
            "Say psd=True; a sum over few samples has a null space",
        )


@on_problems
def laws(case: Case) -> None:
    """Sums, transposes, shifts and restrictions have the same numbers before and after simplify()."""
    t, matrix = case.term, case.matrix
    expected: dict[str, tuple[Expr, Tensor]] = {"2*t - t/2 = 1.5*t": (2 * t - t / 2, 1.5 * matrix)}
    if case.transpose is not None:
        expected["t.T.T = t"] = (t.T.T, matrix)
        if case.square:
            eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
            expected["(t + I/4).T = t.T + I/4"] = ((t + Identity / 4).T, matrix.T + eye / 4)
    if case.unrestricted:
        first = case.problem.layout.names[0]
        part = case.dense(restrict(t, first))
        shift = torch.eye(len(part), dtype=part.dtype, device=part.device) if case.square else 0 * part
        whole = 2 * t - Identity if case.square else 2 * t
        expected["restrict(2*t - I, p) = 2*restrict(t, p) - I"] = (restrict(whole, first), 2 * part - shift)
    cure = "Laws go by facts() and by equality: claim no more than holds, and leave __eq__, children and rebuild() to the base"
    for law, (expr, numbers) in expected.items():
        require_close(case.dense(expr), numbers, what=law, cure=cure)
        simple = simplify(expr, case.problem.facts).expr
        if simplify(simple, case.problem.facts).expr != simple:  # else lowering plans the same for both
            require_close(case.dense(simple), numbers, what=f"{law} after simplify(), which gives {simple}", cure=cure)
