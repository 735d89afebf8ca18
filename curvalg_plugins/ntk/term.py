"""The function that the name ``ntk`` is registered to."""

from __future__ import annotations

from curvalg import Expr, registry


def ntk() -> Expr:
    r"""Empirical neural tangent kernel J Jᵀ of all outputs (M × M, rows in the order of the data).

    An operator on outputs: for N samples with C outputs each M = N C, and row n C + c is output c of sample n. The
    expression is ``jacobian @ jacobian.T``, whose products cost one pass for each factor; ``to_dense()``, exact
    eigenvalues and inverses such as ``inverse(ntk + c * Identity)`` (kernel regression) come from layer inputs and output
    deltas, without a product. No loss is needed. Between two data sets: :func:`cross_kernel`. Jacot et al., arXiv 1806.07572.

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> problem = Problem(torch.nn.Linear(3, 2), None, torch.randn(4, 3))
    >>> K = registry.build("ntk").lower(problem)
    >>> K.shape, K.to_dense().shape
    ((8, 8), torch.Size([8, 8]))
    """
    jacobian = registry.build("jacobian")
    return jacobian @ jacobian.T
