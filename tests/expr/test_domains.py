"""Spaces: what does not fit together is refused when it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings

from curvalg import parse
from curvalg.errors import ExpressionError
from curvalg.expr import (
    GGN,
    Block,
    Expr,
    Facts,
    Hessian,
    Identity,
    Jacobian,
    LossFacts,
    LossHessian,
    NamedExpr,
    Zero,
    ZeroExpr,
    block_diagonal,
    diagonal_part,
    inv_sqrt,
    inverse,
    nystrom,
    restrict,
    sqrt,
)
from tests.support.strategies import O, P, expressions

G, J, L = GGN(), Jacobian(), LossHessian()


@settings(max_examples=80, deadline=None)
@given(expressions((O, P), params=("w",)))
def test_spaces_of_what_fits(expr: Expr) -> None:
    assert (expr.codomain, expr.domain) in {(O, P), (None, None)}
    assert expr.codomain_params is None
    assert expr.domain_params == (("w",) if expr.domain else None)
    assert (expr.T.codomain, expr.T.domain) == (expr.domain, expr.codomain)
    assert expr.T.codomain_params == expr.domain_params


def test_spaces_of_products() -> None:
    gauss_newton = J.T @ L @ J
    assert (gauss_newton.codomain, gauss_newton.domain) == (P, P)
    assert ((J @ J.T).codomain, (J @ J.T).domain) == (O, O)
    assert (Identity.codomain, Identity.domain) == (None, None)
    restricted = restrict(J, "w")
    assert (restricted.domain_params, restricted.codomain_params) == (("w",), None)
    assert (restricted.T @ J).codomain_params == ("w",)
    assert block_diagonal(restrict(G, "w")).domain_params == ("w",)


def test_a_cancelled_sum_keeps_its_spaces() -> None:
    for expr in (G, J, J.T, L, restrict(G, "w"), restrict(J, "w"), restrict(J, "w").T):
        zero = expr - expr
        assert (zero.domain, zero.codomain) == (expr.domain, expr.codomain)
        assert (zero.domain_params, zero.codomain_params) == (expr.domain_params, expr.codomain_params)
        assert zero.T == expr.T - expr.T
        assert zero == zero.T.T
        with pytest.raises(ExpressionError, match=r"zero operator has no inverse|only a square"):
            inverse(zero.T)


def test_a_zero_may_be_restricted_on_one_side() -> None:
    half = restrict(J, "a").T @ (L - L) @ J
    assert half == ZeroExpr(P, P, codomain_params=("a",))
    assert half.T == J.T @ (L - L) @ restrict(J, "a") == ZeroExpr(P, P, domain_params=("a",))
    assert half == half.T.T
    assert half @ G == half
    assert ZeroExpr(P, P, ("b",), ("a",)) == restrict(J, "b").T @ J @ half.T
    assert restrict(J, "a").T @ J + half == restrict(J, "a").T @ J
    assert half == restrict(J, "a").T @ J - restrict(J, "a").T @ J


def test_zeros_can_be_restricted() -> None:
    assert restrict(G - G, "a") == restrict(G, "a") - restrict(G, "a") == ZeroExpr(P, P, ("a",), ("a",))
    assert restrict(J - J, ["a", "b"]) == ZeroExpr(O, P, None, ("a", "b"))
    assert restrict((J - J).T, "a") == restrict(J - J, "a").T == ZeroExpr(P, O, ("a",))
    once = restrict(G - G, "a")
    assert restrict(once, "a") is once
    assert once.children == ()


@dataclass(frozen=True)
class Asymmetric(NamedExpr):
    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(symmetric=False)


@dataclass(frozen=True)
class Definite(NamedExpr):
    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(positive_definite=True)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "ggn @ jacobian": (lambda: G @ J, "cannot multiply"),
    "jacobian + ggn": (lambda: J + G, "cannot add"),
    "jacobian + its transpose": (lambda: J + J.T, "cannot add"),
    "jacobian + a multiple of the identity": (lambda: J + inverse(2 * Identity), "identity.* is square"),
    "zero of a map + a multiple of the identity": (lambda: J - J + inverse(2 * Identity), "identity.* is square"),
    "zero of one space": (lambda: ZeroExpr(P), "two spaces"),
    "zero of an unknown space": (lambda: ZeroExpr("pixels", P), "two spaces"),  # type: ignore[arg-type]
    "zero of some outputs": (lambda: ZeroExpr(O, P, ("a",)), "codomain of this zero is outputs"),
    "zero of any size and some parameters": (lambda: ZeroExpr(domain_params=("a",)), "domain of this zero is None"),
    "zero of no parameters": (lambda: ZeroExpr(P, P, ()), "parameter names"),
    "zero restricted again": (lambda: restrict(restrict(G - G, "w"), "v"), "restricted to"),
    "half restricted zero": (lambda: restrict(ZeroExpr(P, P, ("w",)), "w"), "restricted to"),
    "zeros of different restrictions": (lambda: ZeroExpr(P, P, ("w",)) + G, "cannot add"),
    "half restricted zero + identity": (lambda: ZeroExpr(P, P, ("w",)) + Identity, "identity is square"),
    "blocks of a half restricted zero": (lambda: block_diagonal(ZeroExpr(P, P, ("w",))), "operator on parameters"),
    "inverse of a restricted zero": (lambda: inverse(restrict(G - G, "w")), "zero operator"),
    "jacobian + identity": (lambda: J + Identity, "identity is square"),
    "identity + jacobian": (lambda: Identity + J, "identity is square"),
    "jacobian @ jacobian": (lambda: J @ J, "cannot multiply"),
    "jacobian through identities": (lambda: J @ Identity @ (2 * Identity) @ J, "cannot multiply"),
    "zero of the wrong space": (lambda: ZeroExpr(O, P) + G, "cannot add"),
    "zero in a product": (lambda: (J - J) @ J, "cannot multiply"),
    "jacobian ** 2": (lambda: J**2, "square"),
    "ggn ** 0.5": (lambda: G**0.5, "integer power"),  # type: ignore[operator]
    "ggn ** True": (lambda: G**True, "integer power"),
    "inverse of a jacobian": (lambda: inverse(J), "square"),
    "inverse of zero": (lambda: inverse(Zero), "zero operator"),
    "inverse of a number": (lambda: inverse(3), "takes an expression"),  # type: ignore[arg-type]
    "solver": (lambda: inverse(G, solver="lu"), "unknown solver"),  # type: ignore[arg-type]
    "negative rtol": (lambda: inverse(G, rtol=-1.0), "rtol"),
    "infinite atol": (lambda: inverse(G, atol=float("inf")), "atol"),
    "boolean rtol": (lambda: inverse(G, rtol=True), "rtol"),
    "no atol": (lambda: inverse(G, atol="0"), "atol"),  # type: ignore[arg-type]
    "maxiter": (lambda: inverse(G, maxiter=0), "maxiter"),
    "on_fail": (lambda: inverse(G, on_fail="ignore"), "on_fail"),  # type: ignore[arg-type]
    "check": (lambda: inverse(G, check="no"), "check is True or False"),  # type: ignore[arg-type]
    "preconditioner": (lambda: inverse(G, preconditioner=print), "lower"),  # type: ignore[arg-type]
    "root of a jacobian": (lambda: sqrt(J), "square"),
    "root of a number": (lambda: sqrt(2), "takes an expression"),  # type: ignore[arg-type]
    "root of what is negative": (lambda: sqrt(-(G.T @ G) - Identity), "not positive semi-definite"),
    "root of what is not symmetric": (lambda: sqrt(Asymmetric()), "not symmetric"),
    "inverse root of zero": (lambda: inv_sqrt(G - G), "zero operator"),
    "diagonal of a jacobian": (lambda: diagonal_part(J), "operator on parameters"),
    "diagonal of outputs": (lambda: diagonal_part(L), "operator on parameters"),
    "diagonal of a number": (lambda: diagonal_part(2), "takes an expression"),  # type: ignore[arg-type]
    "nystrom of outputs": (lambda: nystrom(L, 2), "operator on parameters"),
    "nystrom of rank 0": (lambda: nystrom(G, 0), "rank must be an integer ≥ 1, got 0"),
    "nystrom of rank True": (lambda: nystrom(G, True), "rank must be an integer"),
    "nystrom of rank 2.0": (lambda: nystrom(G, 2.0), "rank must be an integer"),  # type: ignore[arg-type]
    "nystrom of a negative seed": (lambda: nystrom(G, 2, seed=-1), "seed must be an integer ≥ 0"),
    "nystrom of what is negative": (lambda: nystrom(-Definite() + Identity, 2), "not positive semi-definite"),
    "nystrom of what is not symmetric": (lambda: nystrom(Asymmetric() + Identity, 2), "not symmetric"),
    "A * B": (lambda: G * Hessian(), r"write \(ggn\) @ \(hessian\)"),
    "A / B": (lambda: G / Hessian(), r"write \(ggn\) @ inverse\(hessian\)"),
    "1 / A": (lambda: 1 / G, r"write 1 \* inverse\(ggn\)"),
    "A / 0": (lambda: G / 0, "by zero"),
    "A @ vector": (lambda: G @ [1.0], "lower"),  # type: ignore[operator]
    "vector @ A": (lambda: [1.0] @ G, "lower"),  # type: ignore[operator]
    "restricted + whole": (lambda: restrict(G, "w") + G, "cannot add"),
    "different restrictions": (lambda: restrict(G, "w") + restrict(G, "v"), "cannot add"),
    "restricted @ whole": (lambda: restrict(G, "w") @ G, "cannot multiply"),
    "block-diagonal of restricted + whole": (lambda: block_diagonal(restrict(G, "w")) + G, "cannot add"),
    "restricted again": (lambda: restrict(restrict(G, "w"), "v"), "restricted to"),
    "half restricted": (lambda: restrict(J.T @ restrict(J, "w"), "w"), "restricted to"),
    "restrict outputs": (lambda: restrict(L, "w"), "chooses parameters"),
    "restrict to nothing": (lambda: restrict(G, []), "parameter names"),
    "restrict to ''": (lambda: restrict(G, ""), "parameter names"),
    "restrict to a number": (lambda: restrict(G, 3), "parameter names"),  # type: ignore[arg-type]
    "restrict to lists": (lambda: restrict(G, [["a"]]), "parameter names"),  # type: ignore[list-item]
    "restrict a number": (lambda: restrict(3, "w"), "takes an expression"),  # type: ignore[arg-type]
    "blocks of a jacobian": (lambda: block_diagonal(J), "operator on parameters"),
    "blocks of outputs": (lambda: block_diagonal({"w": L}), "operator on parameters"),
    "blocks of a half restricted": (lambda: block_diagonal(J.T @ restrict(J, "w")), "operator on parameters"),
    "no blocks": (lambda: block_diagonal([]), "takes an expression"),
    "blocks of a number": (lambda: block_diagonal(3), "takes an expression"),  # type: ignore[call-overload]
    "a block of a number": (lambda: Block(("w",), 3), "holds an expression"),  # type: ignore[arg-type]
    "unknown partition": (lambda: block_diagonal(G, by="layer"), "'parameter', 'module'"),  # type: ignore[arg-type]
    "no partition": (lambda: block_diagonal(G, by=()), "groups of names"),
    "partition by a number": (lambda: block_diagonal(G, by=3), "groups of names"),  # type: ignore[arg-type]
    "partition of blocks": (lambda: block_diagonal({"w": G}, by="module"), "name their own"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_when_written(what: str) -> None:
    write, message = REFUSED[what]
    with pytest.raises(ExpressionError, match=message):
        write()


def test_restrict_leaves_alone_what_needs_no_restriction() -> None:
    once = restrict(G, ["a", "b", "a"])
    assert restrict(once, ("a", "b")) is once
    assert restrict(J @ G, "a").domain_params == ("a",)


def test_what_has_no_size_gets_that_of_the_parameters_it_is_restricted_to() -> None:
    for expr in (Identity, Zero, 2 * Identity, inverse(3 * Identity), sqrt(2 * Identity) + Identity / 2):
        part = restrict(expr, ["a", "b"])
        assert (part.domain, part.codomain) == (P, P)
        assert part.domain_params == part.codomain_params == ("a", "b")
        assert restrict(part, ["a", "b"]) == part
        assert parse(str(part)) == part
        with pytest.raises(ExpressionError, match="restricted to"):
            restrict(part, "c")
    assert restrict(2 * G + 3 * Identity, "w").simplify() == 2 * restrict(G, "w") + 3 * Identity
    assert restrict(Identity, "w") + restrict(G, "w") == restrict(G, "w") + Identity


def test_parts_and_roots_keep_the_parameters_of_what_is_in_them() -> None:
    for make in (sqrt, diagonal_part, lambda e: nystrom(e, 2)):
        part = make(restrict(G, "w"))
        assert part.domain_params == part.codomain_params == ("w",)
        assert (part.domain, part.codomain) == (P, P)
    assert sqrt(L).domain == O


def test_parts_and_roots_of_the_identity_and_of_zero_are_these() -> None:
    for make in (sqrt, diagonal_part, lambda e: nystrom(e, 2)):
        for expr in (Identity, Zero, G - G, restrict(G - G, "w")):
            assert make(expr) is expr
    assert nystrom(3 * Identity, 2) == 3 * Identity
    assert nystrom(G - G + 3 * Identity, 2) == G - G + 3 * Identity


def test_a_shift_is_kept_out_of_a_nystrom_approximation() -> None:
    assert nystrom(G / 2 + 3 * Identity, 2, seed=1) == nystrom(G / 2, 2, seed=1) + 3 * Identity
    restricted = nystrom(restrict(G, "w") + Identity, 2)
    assert restricted == nystrom(restrict(G, "w"), 2) + Identity
    hidden = (G @ G + 3 * Identity).T
    assert nystrom(hidden, 2) == nystrom(hidden - 3 * Identity, 2) + 3 * Identity
    assert nystrom(hidden, 2).simplify() == nystrom(G @ G, 2) + 3 * Identity
    assert nystrom((3 * Identity).T, 2) == (3 * Identity).T
    assert nystrom(Definite() - 2 * Identity, 1) == nystrom(Definite(), 1) - 2 * Identity


def test_the_order_of_given_blocks_does_not_count() -> None:
    one, other = Block(("a",), G), Block(("b",), 2 * G)
    assert block_diagonal([one, other]) == block_diagonal([other, one])
    assert hash(block_diagonal([one, other])) == hash(block_diagonal([other, one]))
    assert block_diagonal([one, one]) != block_diagonal([one])
    assert block_diagonal([one, other]) - block_diagonal([other, one]) == G - G
