"""Moving averages of bound approximations, and damping of their factors: what K-FAC does between its steps."""

from __future__ import annotations

from curvalg import Diagonal, Expr, Kronecker, OptionError


def average_factors(old: Expr, new: Expr, decay: float = 0.95) -> Expr:
    """The moving average of two bound approximations, factor by factor: decay · old + (1 − decay) · new.

    Products of averages are not averages of products: an optimiser that keeps running factors (Martens and Grosse, arXiv
    1503.05671, §5) means this one. Dense blocks and diagonals are averaged as they are.

    Args:
        old, new: what ``registry.build("kfac").bound(problem)`` gives, of one layout.
        decay: weight of the old one, from 0 to 1.

    Raises:
        OptionError: a decay out of range, expressions that do not match, or ones of other things than Kronecker products and
            diagonals.

    >>> import torch
    >>> from curvalg import Identity, Problem, inverse, registry
    >>> net = torch.nn.Linear(3, 2)
    >>> problems = [Problem(net, torch.nn.MSELoss(), (torch.randn(9, 3), torch.randn(9, 2))) for _ in range(2)]
    >>> first, second = (registry.build("kfac").bound(problem) for problem in problems)
    >>> running = average_factors(first, second, decay=0.9)
    >>> inverse(running + 0.1 * Identity).lower(problems[0]).shape
    (8, 8)
    """
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
        raise OptionError(f"average_factors: decay is a number from 0 to 1, got {decay!r}")
    if str(old) != str(new):
        raise OptionError(
            f"average_factors: expected two matrices of the same blocks, got {str(old)[:200]} and {str(new)[:200]}; bind the "
            "same term on problems over the same parameters"
        )
    return _averaged(old, new, float(decay))


def _averaged(old: Expr, new: Expr, decay: float) -> Expr:
    if isinstance(old, Kronecker) and isinstance(new, Kronecker):
        factors = [decay * a + (1 - decay) * b for a, b in zip(old.factors, new.factors, strict=True)]
        return Kronecker(*factors, order=new.order)
    if isinstance(old, Diagonal) and isinstance(new, Diagonal):
        return Diagonal(decay * old.values + (1 - decay) * new.values)
    if not new.children:
        raise OptionError(
            f"average_factors: {new} is neither a Kronecker product nor a diagonal; average the factors of kfac before "
            "damping and inverting"
        )
    return new.rebuild(tuple(_averaged(a, b, decay) for a, b in zip(old.children, new.children, strict=True)))


def damp_factors(expr: Expr, damping: float) -> Expr:
    """A bound approximation whose factors are damped, (B + √c/π I) ⊗ (A + π √c I) in place of B ⊗ A + c I.

    It only approximates ``expr + c * Identity``, but its inverse takes Cholesky factorisations in place of eigendecompositions,
    as is usual in K-FAC optimisers. π² = (tr A / dim A) / (tr B / dim B). Dense blocks and diagonals are damped by c.
    A multiple s · B ⊗ A is damped as s · (B ⊗ A + (c/s) I) is. Martens and Grosse, arXiv 1503.05671, §6.3.

    Args:
        expr: what ``registry.build("kfac").bound(problem)`` or :func:`average_factors` gives.
        damping: c > 0.

    Raises:
        OptionError: a damping that is no positive number, or an expression of other things than Kronecker products and
            diagonals.

    >>> import torch
    >>> from curvalg import Problem, inverse, registry
    >>> problem = Problem(torch.nn.Linear(3, 2), torch.nn.MSELoss(), (torch.randn(9, 3), torch.randn(9, 2)))
    >>> inverse(damp_factors(registry.build("kfac").bound(problem), 0.1)).lower(problem).shape
    (8, 8)
    """
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < float("inf"):
        raise OptionError(f"damp_factors: damping is a positive number, got {damping!r}")
    if isinstance(expr, Kronecker):
        from curvalg_plugins.kronecker import factors  # needs torch

        if len(expr.factors) == 1:
            return Kronecker(factors.damped(expr.factors[0], damping), order=expr.order)
        if len(expr.factors) == 2:
            output, inputs = (f if f.ndim == 3 else f[None] for f in expr.factors)
            made = factors.split_damping(output, inputs, damping)
            return Kronecker(*(made if expr.count is not None else (f[0] for f in made)), order=expr.order)
    if isinstance(expr, Diagonal):
        return Diagonal(expr.values + damping)
    if (coefficients := getattr(expr, "coefficients", None)) is not None:  # a multiple of a matrix
        plain = len(coefficients) == 1 and not getattr(expr, "shift", 0)
        ((part, scale),) = coefficients.items() if plain else [(expr, 0)]
        if scale <= 0:
            raise OptionError(
                f"damp_factors: expected one matrix, or a positive multiple of it, got {expr}; damp what kfac gives, before it "
                "is added to something"
            )
        return float(scale) * damp_factors(part, damping / float(scale))
    if not expr.children:
        raise OptionError(f"damp_factors: {expr} is neither a product of two Kronecker factors nor a diagonal")
    return expr.rebuild(tuple(damp_factors(part, damping) for part in expr.children))
