"""Structured forms of a matrix, tried in order; each is offered with its cost, or declined with the reason.

A form makes inverses, square roots, traces and spectra exact. A newcomer is one function under its name here, and the name in
:data:`curvalg.expr.SOLVERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvalg.errors import ExpressionError
from curvalg.expr import (
    SOLVERS,
    BlockDiagonal,
    Eigenbasis,
    Expr,
    Identity,
    Inverse,
    Kronecker,
    LowRank,
    SquareRoot,
    add,
)
from curvalg.expr.affine_form import affine
from curvalg.lowering.blocks.diagonal_values import DIAGONAL, diagonal_values
from curvalg.lowering.blocks.rows import RowRanges
from curvalg.lowering.blocks.submatrices import block_places, block_problem
from curvalg.lowering.inverses.kronecker_spectra import eigenvalues, spectrum
from curvalg.lowering.inverses.offer import BoundMatrix, Form, Offer, OfferRule
from curvalg.lowering.inverses.priors import damped_by_name
from curvalg.lowering.inverses.rounding import epsilon, noise
from curvalg.lowering.low_rank.factored_sum import factored_sum
from curvalg.lowering.low_rank.gram import Gram
from curvalg.lowering.low_rank.kernel import is_kernel, kernel
from curvalg.lowering.low_rank.weighted_factor import WeightedFactor
from curvalg.lowering.matrices import (
    Basis,
    Blocks,
    DenseMatrix,
    Inverted,
    KroneckerBasis,
    KroneckerCholesky,
    KroneckerLU,
    MatrixBasis,
    Spectral,
    Structure,
    UnitBasis,
    Woodbury,
    placed,
)
from curvalg.lowering.matrices.array_leaves import numbers, tensor
from curvalg.lowering.sweeps.contract import is_ours, named
from curvalg.problem import Snapshot
from curvalg.rewrite import simplify
from curvalg.solve import NOISE, eigenpairs
from curvalg.tensors.memory import wide, widest
from curvalg.tensors.random_numbers import normals

DENSE_LIMIT = 4096
"""The most rows of a matrix that is built and factorised."""
_OFFERS: dict[str, OfferRule] = {}


def _form(name: str) -> Callable[[OfferRule], OfferRule]:
    """Register a function as the form of the given name."""

    def register(rule: OfferRule) -> OfferRule:
        _OFFERS[name] = rule
        return rule

    return register


def _like(matrix: BoundMatrix) -> Tensor:
    """An empty tensor on the device of the problem, in its widest float."""
    device = matrix.problem.device
    return torch.empty(0, dtype=widest(device), device=device)


@_form("diagonal")
def _diagonal(matrix: BoundMatrix) -> Offer:
    parts, shift = affine(matrix.expr)
    found = [(c, diagonal_values(part, matrix.problem) if isinstance(part, DIAGONAL) else None) for c, part in parts]
    if any(values is None for _, values in found):
        return "the matrix is not made of diagonals and the identity"

    def make(_: Snapshot) -> Structure:
        like = _like(matrix)
        values = like.new_full((matrix.size,), shift)
        for c, part in found:
            values = values + c * tensor(part, like)
        basis, noise = UnitBasis(matrix.size, like.to(matrix.problem.dtype)), None if shift else 0.0  # a sum can cancel
        return Spectral(matrix.size, values, basis, what=str(matrix.expr), noise=noise)

    return Form("diagonal", "a division", make)


@_form("kronecker")
def _kronecker(matrix: BoundMatrix) -> Offer:
    parts, shift = affine(matrix.expr)
    if len(parts) != 1 or not isinstance(leaf := parts[0][1], Kronecker):
        return damped_by_name(matrix)
    scale, sizes = parts[0][0], [int(f.shape[-1]) for f in leaf.factors]
    shown = " and ".join(f"{n} x {n}" for n in sizes) + (f", {leaf.count} each," if leaf.count is not None else "")
    flops = sum(9 * n**3 for n in sizes) * (leaf.count or 1)
    like = _like(matrix)
    if leaf.facts().symmetric and leaf.plain and len(sizes) > 1 and not shift and not matrix.spectral:
        cholesky = sum(n**3 for n in sizes) / 3
        return Form(
            "kronecker",
            f"Cholesky factorisations of {shown} once ({_flops(cholesky)}), and the spectrum where that is asked for",
            lambda snapshot: KroneckerCholesky(
                [tensor(f, like.to(matrix.problem.dtype)) for f in leaf.factors],
                scale,
                lambda: _kronecker_spectral(matrix, snapshot, leaf, scale, shift),
            ),
        )
    if leaf.facts().symmetric:
        cost = f"eigendecompositions of {shown} once ({_flops(flops)}), kept for every damping"
        return Form(
            "kronecker",
            cost,
            lambda snapshot: _kronecker_spectral(matrix, snapshot, leaf, scale, shift),
            spectra=((matrix.problem, leaf, like),),
        )
    if shift or not leaf.plain:
        return (
            f"its factors are not symmetric, and it is {'damped' if shift else 'one of several products, or reordered'}"
        )
    return Form(
        "kronecker",
        f"LU factorisations of {shown} once",
        lambda _: KroneckerLU([tensor(f, like) for f in leaf.factors], scale),
        spectral=False,
    )


def _kronecker_spectral(
    matrix: BoundMatrix, snapshot: Snapshot, leaf: Kronecker, scale: float, shift: float
) -> Structure:
    like = _like(matrix)
    pairs = spectrum(matrix.problem, snapshot, leaf, like)
    values = eigenvalues(leaf, pairs)
    order = numbers(leaf.order, like)
    basis = KroneckerBasis([vectors.to(matrix.problem.dtype) for _, vectors in pairs], order)
    values = scale * placed(values.reshape(-1), order) + shift
    return Spectral(matrix.size, values, basis, what=str(matrix.expr), noise=None if shift else 0.0)


@_form("eigenbasis")
def _eigenbasis(matrix: BoundMatrix) -> Offer:
    parts, shift = affine(matrix.expr)
    if len(parts) != 1 or not isinstance(leaf := parts[0][1], Eigenbasis):
        return "the matrix is not one Eigenbasis and the identity"
    scale = parts[0][0]

    def make(_: Snapshot) -> Structure:
        like = torch.empty(0, dtype=matrix.problem.dtype, device=matrix.problem.device)
        basis: Basis
        if isinstance(leaf.basis, Kronecker):
            basis = KroneckerBasis([tensor(f, like) for f in leaf.basis.factors], numbers(leaf.basis.order, like))
        else:
            basis = MatrixBasis(tensor(leaf.basis, like))
        values = scale * tensor(leaf.values, wide(like)) + shift
        # Squares of gradients in a basis that is rounded itself.
        noise = None if shift else (NOISE * torch.finfo(like.dtype).eps) ** 2
        return Spectral(matrix.size, values, basis, what=str(matrix.expr), noise=noise)

    return Form("eigenbasis", "two changes of basis and a division", make)


@_form("blocks")
def _blocks(matrix: BoundMatrix) -> Offer:
    blocks = matrix_blocks(matrix)
    if isinstance(blocks, str):
        return blocks
    forms: list[tuple[RowRanges, Form]] = []
    for places, block, label in blocks:
        form, chain = find(block)
        if form is None:
            return f"the block over {label} has no structured form ({'; '.join(chain)})"
        forms.append((places, form))
    counts: dict[str, int] = {}
    for _, form in forms:
        counts[form.name] = counts.get(form.name, 0) + 1
    shown = ", ".join(f"{n} by {name}" for name, n in counts.items())
    return Form(
        "blocks",
        f"{len(forms)} blocks, {shown}",
        lambda snapshot: Blocks([(places, form.at(snapshot)) for places, form in forms]),
        spectral=all(form.spectral for _, form in forms),
        spectra=tuple(wanted for _, form in forms for wanted in form.spectra),
        rows=sum(form.rows for _, form in forms),
        diagonal_rows=sum(form.diagonal_rows for _, form in forms),
    )


def matrix_blocks(matrix: BoundMatrix) -> list[tuple[RowRanges, BoundMatrix, str]] | str:
    """The triples (where it lies, block, names) of a block-diagonal matrix that covers everything, else why it is none."""
    expr = matrix.expr
    if not isinstance(expr, BlockDiagonal) or isinstance(expr.what, Expr) or not expr.complete:
        return "the matrix is not block-diagonal"
    return [
        (
            block_places(matrix.problem, block),
            matrix.of(block.expr, block_problem(matrix.problem, block)),
            ", ".join(block.params),
        )
        for block in expr.what
    ]


@_form("woodbury")
def _woodbury(matrix: BoundMatrix) -> Offer:
    parts, shift = affine(matrix.expr)
    updates = [(c, part) for c, part in parts if isinstance(part, LowRank)]
    others = [(part, c) for c, part in parts if not isinstance(part, LowRank)]
    if not updates:
        return "the matrix has no low-rank summand"
    rank = sum(int(part.left.shape[1]) for _, part in updates)
    if rank >= matrix.size:
        return f"rank {rank} is not less than {matrix.size} rows"
    symmetric = all(part.right is None and part.facts().symmetric for _, part in updates)
    if not others and symmetric:
        cost = f"a QR factorisation of {matrix.size} x {rank} once ({_flops(2 * matrix.size * rank**2)})"
        return Form("woodbury", cost, lambda _: _low_rank_spectral(matrix, updates, shift))
    rest = matrix.of(simplify(add([*others, (Identity, shift)]), matrix.problem.facts).expr)
    if not others and not shift:
        return "there is nothing to update: a low-rank matrix alone has no inverse"
    form, chain = find(rest, exclude=("woodbury", "dense"))
    if form is None:
        return f"the rest has no structured form ({'; '.join(chain)})"
    cost = f"an update of rank {rank} to a matrix solved by {form.name} ({form.cost})"

    def make(snapshot: Snapshot) -> Structure:
        left, core, right = _stacked(updates, _like(matrix))
        build = None if matrix.size > DENSE_LIMIT else lambda: dense(matrix, snapshot)
        return Woodbury(form.at(snapshot), left, core, right, otherwise=build)

    return Form("woodbury", cost, make, spectral=False)


def _stacked(updates: Sequence[tuple[float, LowRank]], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A sum Σ c L C Rᵀ as one L C Rᵀ with a block-diagonal core."""
    lefts, cores, rights = [], [], []
    for c, leaf in updates:
        left = tensor(leaf.left, like)
        core = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
        if leaf.core is not None:
            given = tensor(leaf.core, like)
            core = torch.diag(given) if given.ndim == 1 else given
        lefts.append(left)
        cores.append(c * core)
        rights.append(left if leaf.right is None else tensor(leaf.right, like))
    return torch.cat(lefts, 1), torch.block_diag(*cores), torch.cat(rights, 1)


def _low_rank_spectral(matrix: BoundMatrix, updates: Sequence[tuple[float, LowRank]], shift: float) -> Structure:
    left, core, _ = _stacked(updates, _like(matrix))
    orthonormal, triangle = torch.linalg.qr(left)
    inner = triangle @ core @ triangle.T
    values, vectors = eigenpairs((inner + inner.T) / 2)
    basis = MatrixBasis((orthonormal @ vectors).to(matrix.problem.dtype))
    return Spectral(matrix.size, values + shift, basis, shift, str(matrix.expr))


@_form("gram")
def _gram(matrix: BoundMatrix) -> Offer:
    problem = matrix.problem
    total = factored_sum(matrix.expr, problem)
    if isinstance(total, str):
        return total
    entries, shift = total.entries, total.shift
    for c, term in entries:
        if c <= 0:
            return f"the coefficient of {term} is not positive"
    if shift < 0:
        return "the identity has a negative coefficient"
    if not problem.data.ordered:
        return "the loader shuffles, so that columns of V cannot be identified; pass shuffle=False"
    columns = sum(problem.factor_columns(term) for _, term in entries) * problem.totals.rows
    if columns >= matrix.size:
        return f"M = {columns} columns are not fewer than D = {matrix.size}"
    need, limit = 8 * columns**2, problem.common_workspace
    if need > limit:
        return f"the Gram matrix of M = {columns} columns needs {_bytes(need)} of a budget of {_bytes(limit)}"
    cost = (
        f"the Gram matrix of M = {columns} columns once ({_bytes(need)} in float64), then a Cholesky factorisation for each "
        f"damping ({_flops(columns**3 / 3)})"
    )
    what = str(matrix.expr)
    singular = None if shift else f"its rank is at most M = {columns}, less than D = {matrix.size}"
    return Form(
        "gram",
        cost,
        lambda snapshot: _compared(Gram(WeightedFactor(problem, snapshot, entries), shift, what), matrix, snapshot),
        singular=singular,
        rows=columns,
        # Sums of squares, by a backward pass for every column of a row.
        diagonal_rows=None if any(term.centred for _, term in entries) else columns // problem.totals.rows,
    )


def _compared(gram: Gram, matrix: BoundMatrix, snapshot: Snapshot) -> Gram:
    """The form, after a check that the columns that a plugin's terms give make the matrix that their products are of.

    Raises:
        ExpressionError: they do not.
    """
    problem = matrix.problem
    others = [term for _, term in gram.columns.entries if not is_ours(term)]
    if not problem.verify or not others:
        return gram
    x = normals((matrix.size, 1), 0).to(problem.device, problem.dtype)
    plan = getattr(matrix.plan, "otherwise", matrix.plan)  # which may take products from the factor itself
    right = plan.apply(snapshot, x)
    error, size = float((gram.multiply(x) - right).norm()), float(right.norm())
    if not error <= max(epsilon(problem) ** 0.5, noise(problem)) * size:
        raise ExpressionError(
            f"{', '.join(map(named, others))}: the columns of factor do not make the matrix that products give (they differ by "
            f"{error / size if size else math.inf:.1e}); correct factor, or leave it out"
        )
    return gram


@_form("kernel")
def _kernel(matrix: BoundMatrix) -> Offer:
    parts, shift = affine(matrix.expr)
    problem = matrix.problem
    if len(parts) != 1 or not is_kernel(parts[0][1]):
        return "the matrix is not J J.T and the identity"
    if problem.model.batch_statistics:
        return "samples influence each other through batch statistics"
    n, limit = matrix.size, problem.common_workspace
    if (need := 8 * n**2) > limit:
        return f"J J.T of M = {n} outputs needs {_bytes(need)} of a budget of {_bytes(limit)}"

    def make(snapshot: Snapshot) -> Structure:
        values = parts[0][0] * kernel(problem, snapshot)
        values.diagonal().add_(shift)
        return DenseMatrix(values, matrix.facts, str(matrix.expr))

    cost = (
        f"J J.T of M = {n} outputs once from layer inputs and deltas ({_bytes(need)} in float64), then a factorisation"
    )
    return Form("kernel", cost, make)


@_form("function")
def _function(matrix: BoundMatrix) -> Offer:
    parts, shift = affine(matrix.expr)
    if len(parts) != 1 or not isinstance(outer := parts[0][1], (Inverse, SquareRoot)):
        return "the matrix is not a function of another and the identity"
    scale, is_root = parts[0][0], isinstance(outer, SquareRoot)
    form, chain = find(matrix.of(outer.expr, spectral=is_root or scale != 1 or bool(shift)))
    if form is None:
        return f"the matrix inside has no structured form ({'; '.join(chain)})"

    def make(snapshot: Snapshot) -> Structure:
        inner = form.at(snapshot)
        name = "sqrt" if is_root else "inverse"
        mapped = inner.mapped(torch.sqrt if is_root else torch.reciprocal, name)
        if mapped is None:
            return Inverted(inner)
        plain = scale == 1 and not shift
        result = mapped if plain else mapped.mapped(lambda v: scale * v + shift, "affine")
        assert result is not None
        return result

    return Form(
        "function",
        f"by the eigenvalues of a matrix in {form.name} form ({form.cost})",
        make,
        spectral=form.spectral,
        spectra=form.spectra,
    )


@_form("dense")
def _dense(matrix: BoundMatrix) -> Offer:
    n = matrix.size
    if n > DENSE_LIMIT:
        return f"{n} rows are more than {DENSE_LIMIT}"
    facts = matrix.facts
    kind = "Cholesky" if facts.positive_definite else "LU"
    cost = f"{n} products once, then {'an' if kind == 'LU' else 'a'} {kind} factorisation of {_bytes(8 * n * n)}"
    return Form("dense", cost, lambda snapshot: dense(matrix, snapshot), spectral=bool(facts.symmetric), rows=n)


def dense(matrix: BoundMatrix, snapshot: Snapshot) -> Structure:
    """The matrix built by products, float64; kept without its shift, for another damping."""
    expr, problem, (_, shift) = matrix.expr, matrix.problem, affine(matrix.expr)
    base = matrix.of(expr - shift * Identity) if shift else matrix
    values: Tensor = problem.cached(snapshot).get("dense", base.expr, lambda: _build(base, snapshot), budgeted=True)
    if shift:
        (values := values.clone()).diagonal().add_(shift)
    return DenseMatrix(values, matrix.facts, str(expr), epsilon(problem))


def _build(matrix: BoundMatrix, snapshot: Snapshot) -> Tensor:
    problem, n = matrix.problem, matrix.size
    if (known := matrix.plan.dense(snapshot)) is not None:
        return (wide(known) + wide(known).T) / 2 if matrix.facts.symmetric else wide(known)
    eye = torch.eye(n, dtype=problem.dtype, device=problem.device)
    columns = [matrix.plan.apply(snapshot, eye[:, at : at + 256]) for at in range(0, n, 256)]
    built = wide(torch.cat(columns, 1))
    return (built + built.T) / 2 if matrix.facts.symmetric else built


FORMS: dict[str, OfferRule] = {name: _OFFERS[name] for name in SOLVERS if name in _OFFERS}
"""All forms, in the order in which they are tried."""


def find(matrix: BoundMatrix, exclude: Sequence[str] = (), asked: str = "auto") -> tuple[Form | None, list[str]]:
    """The first form on offer, and a line for each one that declined before it."""
    key = matrix.expr, matrix.problem, matrix.spectral, tuple(exclude), asked
    if key not in matrix.found:
        matrix.found[key] = _find(matrix.localised(), exclude, asked)
    form, chain = matrix.found[key]
    return form, list(chain)


def _find(matrix: BoundMatrix, exclude: Sequence[str], asked: str) -> tuple[Form | None, list[str]]:
    chain: list[str] = []
    for name, rule in FORMS.items():
        if name in exclude or asked not in ("auto", name):
            continue
        offer = rule(matrix)
        if isinstance(offer, Form) and (offer.spectral or not matrix.spectral):
            return offer, chain
        chain.append(f"{name}: declined, {offer if isinstance(offer, str) else 'it gives solves only'}")
    return None, chain


def _flops(count: float) -> str:
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kFLOP"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 2**10:.3g} KiB"
