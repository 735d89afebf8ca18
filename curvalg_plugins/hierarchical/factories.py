"""The factories that the names are registered to: each chooses between a second pass and stored class means."""

from __future__ import annotations

from curvalg import Expr, OptionError
from curvalg_plugins.hierarchical.stored import StoredClass, StoredCross, StoredSame, StoredWithin
from curvalg_plugins.hierarchical.terms import GGNClass, GGNCross, GGNSame, GGNSameSpread, GGNWithin, Own


def ggn_class(stored: bool = False) -> Expr:
    r"""Between-class part of the GGN, Σ_c W_c ḡ_c ḡ_cᵀ (D × D, rank ≤ C): its eigenvalues are the C outliers.

    With extended gradients g_ik = J_iᵀ (p_i − e_k), weights w_ik = α_i p_ik and c = y_i: W_ck = Σ_{i: y_i = c} w_ik,
    ḡ_ck the w-weighted mean of g_ik over class c, W_c = Σ_{k≠c} W_ck and ḡ_c the W-weighted mean of ḡ_ck over k ≠ c
    (Papyan, arXiv 2008.11865). ``ggn = ggn_class + ggn_cross + ggn_within + ggn_same`` exactly, on unbalanced and empty
    classes, with class weights and any number of batches. Defined for softmax cross-entropy; of probability targets c is the
    most likely class.

    Args:
        stored: keep the C² class means ḡ_ck (C² · D numbers, C² gradients once) and make an explicit low-rank matrix of
            them, instead of a second pass over the data in every product.

    Raises:
        LossError: when lowered on another loss.

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> data = (torch.randn(8, 3), torch.tensor([0, 1, 2, 0, 0, 1, 2, 2]))
    >>> problem = Problem(torch.nn.Linear(3, 3), torch.nn.CrossEntropyLoss(), data)
    >>> parts = [registry.build(f"ggn_{name}") for name in ("class", "cross", "within", "same")]
    >>> rest = (registry.build("ggn") - sum(parts[1:], parts[0])).lower(problem)
    >>> bool((rest @ torch.ones(12)).abs().max() < 1e-6)
    True
    """
    return StoredClass(stored=True) if stored else GGNClass()


def ggn_cross(stored: bool = False) -> Expr:
    """Between-cross-class part of the GGN, Σ_c Σ_{k≠c} W_ck (ḡ_ck − ḡ_c)(ḡ_ck − ḡ_c)ᵀ (D × D, rank ≤ C(C − 2)).

    Its eigenvalues are the small bulk of about C² beside the outliers. Notation, losses and errors as in
    :func:`ggn_class` (Papyan, arXiv 2008.11865).

    Args:
        stored: keep the class means and make an explicit low-rank matrix of them.

    Raises:
        LossError: when lowered on another loss.
    """
    return StoredCross(stored=True) if stored else GGNCross()


def ggn_within(own: Own = "within", stored: bool = False) -> Expr:
    """Within-cross-class part of the GGN, Σ_i Σ_k w_ik (g_ik − ḡ_ck)(g_ik − ḡ_ck)ᵀ with c = y_i (D × D): the bulk.

    Notation, losses and errors as in :func:`ggn_class` (Papyan, arXiv 2008.11865).

    Args:
        own: where the spread of the gradients of a sample's own class, k = y_i, counts: "within" sums over all k; "same"
            over k ≠ y_i, and ``ggn_same(own="same")`` holds the rest.
        stored: keep the class means (C² · D numbers) instead of a second pass over the data in every product.

    Raises:
        ExpressionError: an unknown choice of ``own``.
        LossError: when lowered on another loss.
    """
    _check(own)
    return StoredWithin(own, stored=True) if stored else GGNWithin(own)


def ggn_same(own: Own = "within", stored: bool = False) -> Expr:
    """Same-class part of the GGN, Σ_c W_cc ḡ_cc ḡ_ccᵀ (D × D, rank ≤ C).

    Notation, losses and errors as in :func:`ggn_class` (Papyan, arXiv 2008.11865).

    Args:
        own: as in :func:`ggn_within`; "same" gives Σ_i w_iy g_iy g_iyᵀ with y = y_i, the spread included, in one pass.
        stored: keep the class means and make an explicit low-rank matrix of them; only with own="within".

    Raises:
        ExpressionError: ``stored`` with own="same", which has no class means.
    """
    _check(own)
    if own == "same":
        if stored:
            raise OptionError('ggn_same(own="same") has no class means to store; leave stored=True out')
        return GGNSameSpread(own)
    return StoredSame(stored=True) if stored else GGNSame()


def _check(own: str) -> None:
    if own not in ("within", "same"):
        raise OptionError(f"own is 'within' or 'same', got {own!r}")
