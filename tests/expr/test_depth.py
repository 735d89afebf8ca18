"""Deep expressions: what is found of a node is found once, and what is too deep or too long is refused as an expression."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch

from curvalg import ExpressionError, Facts, Identity, Problem, Term, inverse, parse, registry
from curvalg.expr import GGN, MAX_DEPTH, MAX_FACTORS, Expr, Hessian, Jacobian, sqrt
from curvalg.rewrite import Law, rewrite

NESTED = 200


def nested(base: Expr, levels: int) -> Expr:
    for i in range(levels):
        base = inverse(base + (i + 1) * Identity)
    return base


class Counted(Term):
    """A term that counts how often it is asked for its facts and its hash."""

    asked: Counter[str] = Counter()

    def facts(self, loss: object = None) -> Facts:
        Counted.asked["facts"] += 1
        return Facts(psd=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counted)

    def __hash__(self) -> int:
        Counted.asked["hash"] += 1
        return 7


def asked(levels: int) -> Counter[str]:
    """What building, printing, hashing and simplifying asks of the innermost term."""
    Counted.asked.clear()
    expr = nested(Counted(), levels)
    hash(expr), str(expr), expr.tree(), expr._repr_latex_(), expr.facts(), expr.T.simplify()
    return Counter(Counted.asked)


def test_the_work_at_a_leaf_does_not_grow_with_what_is_around_it() -> None:
    assert asked(20) == asked(150)


def test_the_work_at_a_node_does_not_grow_with_how_often_it_occurs() -> None:
    visits: Counter[Expr] = Counter()

    def count(expr: Expr, _: object) -> None:
        visits[expr] += 1

    expr: Expr = Hessian()
    for _ in range(60):  # 2⁶⁰ hessians, were they not one
        expr = inverse(expr @ expr.T + Identity) @ sqrt(expr.T @ expr + 2 * Identity)
    rewrite(expr, [Law("count", "A = A", Expr, count, lambda w: [])])
    assert max(visits.values()) == 1
    assert expr.facts() == Facts()
    assert len(str(expr)) < 200_000


@pytest.mark.parametrize("base", [Hessian(), GGN(), registry.build("kfac"), Jacobian().T @ Jacobian() @ Hessian()])
def test_two_hundred_nested_inverses_are_built_printed_and_lowered(base: Expr) -> None:
    expr, twin = nested(base, NESTED), nested(base, NESTED)
    assert expr == twin
    assert hash(expr) == hash(twin)
    assert str(expr).count("inverse") == NESTED
    assert expr.simplify().simplify() == expr.simplify()
    model = torch.nn.Linear(2, 2).double()
    problem = Problem(model, torch.nn.MSELoss(), (torch.eye(4, 2).double(), torch.ones(4, 2).double()))
    op = expr.lower(problem)
    assert op.shape == (6, 6)


def test_products_with_nested_inverses_are_right() -> None:
    model = torch.nn.Linear(2, 2).double()
    problem = Problem(model, torch.nn.MSELoss(), (torch.eye(4, 2).double(), torch.ones(4, 2).double()))
    value = GGN().lower(problem).to_dense()
    for i in range(12):
        value = torch.linalg.inv(value + (i + 1) * torch.eye(6).double())
    torch.testing.assert_close(nested(GGN(), 12).lower(problem).to_dense(), value)


def test_what_is_kept_is_no_part_of_the_value() -> None:
    fresh, used = nested(Hessian(), 5), nested(Hessian(), 5)
    str(used), hash(used), used.facts(), used.simplify()
    for twin in (copy.copy(used), copy.deepcopy(used), pickle.loads(pickle.dumps(used))):
        assert "_known" not in vars(twin)
        assert twin == fresh
    assert len(pickle.dumps(used)) == len(pickle.dumps(fresh))


@pytest.mark.parametrize("wrap", [sqrt, inverse, lambda e: (e @ GGN()).T, lambda e: e @ e.T + Identity])
def test_what_nests_too_deeply_is_refused(wrap) -> None:
    def build() -> None:
        expr: Expr = Hessian()
        for _ in range(10_000):
            expr = wrap(expr + Identity)

    with pytest.raises(ExpressionError, match=f"{MAX_DEPTH} levels"):
        build()


@pytest.mark.parametrize(
    "text",
    [
        "(" * 10_000 + "ggn" + ")" * 10_000,
        "inverse(" * 10_000 + "ggn" + ")" * 10_000,
        "-" * 10_000 + "ggn",
        "ggn" + ".T" * 10_000,
        "restrict(" * 99 + "ggn" + ", 'a')" * 99 + "(" * 10_000,
    ],
    ids=lambda text: text[:12],
)
def test_texts_that_nest_too_deeply_are_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse(text)


def test_products_have_a_longest_length() -> None:
    for text in ("((ggn**1000)**1000)**1000", "((ggn @ hessian)**1000 @ residual)**1000"):
        with pytest.raises(ExpressionError, match=str(MAX_FACTORS)):
            parse(text)
    longest = GGN() ** MAX_FACTORS
    for build in (lambda: longest @ GGN(), lambda: GGN() ** 10**400, lambda: longest**2, lambda: longest**-2):
        with pytest.raises(ExpressionError, match=str(MAX_FACTORS)):
            build()


def test_a_deep_call_is_an_error_of_expressions_too() -> None:
    model = torch.nn.Linear(2, 2).double()
    problem = Problem(model, torch.nn.MSELoss(), (torch.eye(4, 2).double(), torch.ones(4, 2).double()))
    op = nested(Hessian(), (MAX_DEPTH - 1) // 2).lower(problem)
    with pytest.raises(ExpressionError, match="stack"):
        op @ torch.ones(6).double()


def test_sums_and_products_of_many_operands_do_not_nest() -> None:
    expr = GGN() - Hessian()
    for i in range(1, 300):
        expr = expr + registry.build("ggn_mc", seed=i)
    assert expr.depth == 2
