"""The diagonal of the Hessian, estimated."""

from __future__ import annotations

from curvalg import Expr, OptionError, diagonal_part, registry


def hessian_diagonal(probes: int = 64, seed: int = 0) -> Expr:
    r"""Diagonal of the Hessian of the loss, ∂²L/∂θᵢ², estimated by probing: the mean of v ∘ H v over random signs v (D × D).

    Unbiased; the variance of entry i is Σ_{j≠i} H_ij² / probes. The expression is ``diagonal_part(hessian, probes=...)``; the
    exact diagonal, at D products, is ``diagonal_part(hessian)``. As an estimate it may have negative entries where the
    Hessian has none. Bekas, Kokiopoulou and Saad, Applied Numerical Mathematics 2007; Yao et al. (AdaHessian), AAAI 2021.

    Args:
        probes: Hessian-vector products to take.
        seed: of the signs.

    Raises:
        ExpressionError: probes below one, seed below zero.

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> data = (torch.randn(6, 3), torch.randn(6, 1))
    >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), data)
    >>> estimate = registry.build("hessian_diagonal", probes=2000).lower(problem) @ torch.ones(4)
    >>> exact = registry.build("hessian").lower(problem).to_dense().diagonal()
    >>> bool((estimate - exact).norm() < 0.2 * exact.norm())
    True
    """
    if probes == 0:
        raise OptionError("hessian_diagonal: probes is an integer ≥ 1, got 0; the exact one is diagonal_part(hessian)")
    return diagonal_part(registry.build("hessian"), probes=probes, seed=seed)
