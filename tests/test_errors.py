"""What public functions raise: a ValueError for a count or an option out of its range, a TypeError for a wrong type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import curvalg
from curvalg import (
    Block,
    CurvalgError,
    Diagonal,
    Eigenbasis,
    Identity,
    Kronecker,
    LowRank,
    Problem,
    block_diagonal,
    diagonal_part,
    inv_sqrt,
    inverse,
    nystrom,
    parse,
    registry,
    restrict,
    sqrt,
)
from curvalg import estimate as est
from curvalg.expr import ZeroExpr

GGN = registry.build("ggn")
PROBLEM = Problem(torch.nn.Linear(3, 2), torch.nn.MSELoss(), (torch.ones(4, 3), torch.ones(4, 2)))
OP = (GGN + Identity).lower(PROBLEM)
ONES = torch.ones(8)
Call = Callable[[], Any]

VALUES: dict[str, Call] = {
    "nystrom rank 0": lambda: nystrom(GGN, 0),
    "nystrom rank -1": lambda: nystrom(GGN, -1),
    "nystrom seed": lambda: nystrom(GGN, 2, seed=-1),
    "diagonal_part probes": lambda: diagonal_part(GGN, probes=-1),
    "diagonal_part seed": lambda: diagonal_part(GGN, probes=2, seed=-1),
    "inverse solver": lambda: inverse(GGN, solver="lu"),  # type: ignore[arg-type]
    "inverse rtol": lambda: inverse(GGN, rtol=-1.0),
    "inverse atol": lambda: inverse(GGN, atol=float("inf")),
    "inverse maxiter": lambda: inverse(GGN, maxiter=0),
    "inverse on_fail": lambda: inverse(GGN, on_fail="ignore"),  # type: ignore[arg-type]
    "block_diagonal by": lambda: block_diagonal(GGN, by="layer"),  # type: ignore[arg-type]
    "block_diagonal nothing": lambda: block_diagonal({}),
    "block_diagonal no groups": lambda: block_diagonal(GGN, by=[]),
    "restrict nothing": lambda: restrict(GGN, []),
    "restrict empty name": lambda: restrict(GGN, ""),
    "block of nothing": lambda: Block((), GGN),
    "zero spaces": lambda: ZeroExpr("nowhere", "parameters"),  # type: ignore[arg-type]
    "division by zero": lambda: GGN / 0,
    "scaling by infinity": lambda: GGN * float("inf"),
    "power too long": lambda: GGN**100_000,
    "diagonal of a matrix": lambda: Diagonal(np.ones((2, 2))),
    "kronecker not square": lambda: Kronecker(np.ones((2, 3))),
    "kronecker of nothing": lambda: Kronecker(),
    "low rank core": lambda: LowRank(np.ones((3, 2)), np.ones(3)),
    "low rank right": lambda: LowRank(np.ones((3, 2)), None, np.ones((3, 1))),
    "eigenbasis values": lambda: Eigenbasis(np.eye(3), np.ones(2)),
    "ggn_mc samples": lambda: registry.build("ggn_mc", samples=0),
    "ggn_mc seed": lambda: registry.build("ggn_mc", seed=-1),
    "fisher_mc samples": lambda: registry.build("fisher_mc", samples=-2),
    "kfac fisher": lambda: registry.build("kfac", fisher="bogus"),
    "kfac samples": lambda: registry.build("kfac", fisher="mc", samples=0),
    "kfac samples without draws": lambda: registry.build("kfac", samples=3),
    "kfac damping": lambda: registry.build("kfac", factored_damping=-1.0),
    "ekfac rest": lambda: registry.build("ekfac", rest="drop"),
    "hessian_diagonal probes": lambda: registry.build("hessian_diagonal", probes=0),
    "ggn_diagonal samples": lambda: registry.build("ggn_diagonal", samples=-1),
    "ggn_within own": lambda: registry.build("ggn_within", own="cross"),
    "unknown option": lambda: registry.build("ggn_mc", draws=2),
    "register a name": lambda: registry.register("no name", lambda: GGN),
    "register a word": lambda: registry.register("inverse", lambda: GGN),
    "exact quantity": lambda: OP.exact("rank"),  # type: ignore[arg-type]
    "shape of an operand": lambda: OP @ torch.ones(7),
    "eigsh k": lambda: est.eigsh(OP, 0),
    "eigsh k too large": lambda: est.eigsh(OP, 9),
    "eigsh which": lambda: est.eigsh(OP, 1, which="SM"),  # type: ignore[arg-type]
    "eigsh tol": lambda: est.eigsh(OP, 1, tol=-1.0),
    "eigsh block": lambda: est.eigsh(OP, 1, block=0),
    "eigsh maxiter": lambda: est.eigsh(OP, 1, maxiter=0),
    "eigsh on_fail": lambda: est.eigsh(OP, 1, on_fail="ignore"),  # type: ignore[arg-type]
    "svds k": lambda: est.svds(OP, 0),
    "svds k too large": lambda: est.svds(OP, 9),
    "trace products": lambda: est.trace(OP, products=0),
    "trace tol": lambda: est.trace(OP, tol=2.0),
    "trace method": lambda: est.trace(OP, method="guess"),  # type: ignore[arg-type]
    "trace maxiter": lambda: est.trace(OP, maxiter=-1),
    "diagonal products": lambda: est.diagonal(OP, products=0),
    "logdet products": lambda: est.logdet(OP, products=-1),
    "norm ord": lambda: est.norm(OP, "max"),  # type: ignore[arg-type]
    "matrix_function name": lambda: est.matrix_function(OP, "tan", ONES),
    "matrix_function steps": lambda: est.matrix_function(OP, "sqrt", ONES, steps=0),
    "spectral_density probes": lambda: est.spectral_density(OP, probes=0),
    "spectral_density steps": lambda: est.spectral_density(OP, steps=0),
    "spectral_density outliers": lambda: est.spectral_density(OP, outliers=-1),
    "spectral_density width": lambda: est.spectral_density(OP, width=0.0),
    "effective_dimension damping": lambda: est.effective_dimension(OP, 0.0),
    "tic damping": lambda: est.tic(PROBLEM, damping=-1.0),
    "influence by": lambda: est.influence(OP, by="sample"),  # type: ignore[call-overload]
    "influence topk": lambda: est.influence(OP, topk=0),
    "influence query_batch": lambda: est.influence(OP, query_batch=0),
    "influence_stream query_batch": lambda: est.influence_stream(OP, query_batch=0),
    "saliency groups": lambda: est.saliency(OP, "layer"),
    "saliency first_order": lambda: est.saliency(
        inverse(registry.build("ggn") + Identity).lower(PROBLEM), first_order=True
    ),
    "parse power": lambda: parse("((ggn**1000)**1000)**1000"),
    "parse rank": lambda: parse("nystrom(ggn, 0)"),
    "parse option": lambda: parse("ggn_mc(samples=0)"),
    "parse choice": lambda: parse("inverse(ggn, solver='lu')"),
    "parse unknown option": lambda: parse("ggn_mc(draws=0)"),
}

TYPES: dict[str, Call] = {
    **{
        f"{function.__name__} of a string": partial(function, "ggn", *more)
        for function, *more in (
            *((function,) for function in (sqrt, inv_sqrt, inverse, diagonal_part, block_diagonal)),
            (nystrom, 2),
            (restrict, "a"),
        )
    },
    "adding a number": lambda: GGN + 1,
    "adding to a number": lambda: 1 + GGN,
    "product of a string": lambda: GGN @ "v",  # type: ignore[operator]
    "scaling by a string": lambda: GGN * "2",
    "scaling by a bool": lambda: GGN * True,
    "dividing by a string": lambda: GGN / "2",
    "fractional power": lambda: GGN**0.5,  # type: ignore[operator]
    "nystrom rank": lambda: nystrom(GGN, 2.5),  # type: ignore[arg-type]
    "nystrom rank bool": lambda: nystrom(GGN, True),
    "diagonal_part probes": lambda: diagonal_part(GGN, probes="many"),  # type: ignore[arg-type]
    "inverse rtol": lambda: inverse(GGN, rtol="small"),  # type: ignore[arg-type]
    "inverse maxiter": lambda: inverse(GGN, maxiter=1.5),  # type: ignore[arg-type]
    "inverse preconditioner": lambda: inverse(GGN, preconditioner=3),  # type: ignore[arg-type]
    "inverse solver": lambda: inverse(GGN, solver=["cg"]),  # type: ignore[arg-type]
    "inverse on_fail": lambda: inverse(GGN, on_fail=["raise"]),  # type: ignore[arg-type]
    "block_diagonal by": lambda: block_diagonal(GGN, by=3),  # type: ignore[arg-type]
    "block of a number": lambda: Block(("a",), 3),  # type: ignore[arg-type]
    "block_diagonal of numbers": lambda: block_diagonal({"a": 3}),  # type: ignore[dict-item]
    "restrict names": lambda: restrict(GGN, 3),  # type: ignore[arg-type]
    "restrict a number in names": lambda: restrict(GGN, ["a", 3]),  # type: ignore[list-item]
    "diagonal of a list": lambda: Diagonal([1.0]),
    "kronecker of a list": lambda: Kronecker([[1.0]]),
    "low rank of complex": lambda: LowRank(np.ones((3, 2), complex)),
    "build": lambda: registry.build(3),  # type: ignore[arg-type]
    "build an option": lambda: registry.build("ggn_mc", samples="many"),
    "build a choice": lambda: registry.build("kfac", joint="yes"),
    "build a list": lambda: registry.build("kfac", fisher=["mc"]),
    "register a number": lambda: registry.register(3, lambda: GGN),  # type: ignore[arg-type]
    "register no factory": lambda: registry.register("mine", 3),  # type: ignore[type-var]
    "spec": lambda: registry.spec(3),  # type: ignore[arg-type]
    "describe": lambda: registry.describe(None),  # type: ignore[arg-type]
    "parse": lambda: parse(3),  # type: ignore[arg-type]
    "parse leaves": lambda: parse("D", leaves={"D": 3}),  # type: ignore[dict-item]
    "lower": lambda: GGN.lower("problem"),  # type: ignore[arg-type]
    "preconditioner": lambda: inverse(GGN + Identity).lower(PROBLEM, preconditioner=3),  # type: ignore[arg-type]
    "product with a string": lambda: OP @ "v",
    "product with strings": lambda: OP @ np.array(["v"] * 8),
    "product with complex": lambda: OP @ torch.ones(8, dtype=torch.complex64),
    "eigsh of a string": lambda: est.eigsh("op", 1),  # type: ignore[arg-type]
    "eigsh k": lambda: est.eigsh(OP, 1.5),  # type: ignore[arg-type]
    "eigsh tol": lambda: est.eigsh(OP, 1, tol="small"),  # type: ignore[arg-type]
    "svds k": lambda: est.svds(OP, "two"),  # type: ignore[arg-type]
    "trace products": lambda: est.trace(OP, products=2.5),  # type: ignore[arg-type]
    "trace seed": lambda: est.trace(OP, seed="now"),  # type: ignore[arg-type]
    "trace of an expression": lambda: est.trace(GGN),  # type: ignore[arg-type]
    "spectral_density outliers": lambda: est.spectral_density(OP, outliers="all"),  # type: ignore[arg-type]
    "spectral_density probes": lambda: est.spectral_density(OP, probes=1.5),  # type: ignore[arg-type]
    "effective_dimension damping": lambda: est.effective_dimension(OP, "some"),  # type: ignore[arg-type]
    "tic problem": lambda: est.tic("problem"),  # type: ignore[arg-type]
    "tic damping": lambda: est.tic(PROBLEM, damping="some"),  # type: ignore[arg-type]
    "influence of a string": lambda: est.influence("op"),  # type: ignore[call-overload]
    "influence_stream of gradients": lambda: est.influence_stream(OP, ONES),  # type: ignore[arg-type]
    "self_influence of a string": lambda: est.self_influence("op"),  # type: ignore[arg-type]
    "functional_variance of a string": lambda: est.functional_variance(OP, "test"),  # type: ignore[arg-type]
    "gradient_noise": lambda: est.gradient_noise("problem"),  # type: ignore[arg-type]
    "parse option": lambda: parse("ggn_mc(samples='many')"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_out_of_range_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        VALUES[name]()
    assert isinstance(caught.value, CurvalgError)


@pytest.mark.parametrize("name", TYPES)
def test_a_wrong_type_is_a_type_error(name: str) -> None:
    with pytest.raises(TypeError) as caught:
        TYPES[name]()
    assert isinstance(caught.value, CurvalgError)


def test_every_function_that_takes_options_is_asked() -> None:
    asked = " ".join([*VALUES, *TYPES])
    for name in ("sqrt", "inv_sqrt", "inverse", "restrict", "block_diagonal", "diagonal_part", "nystrom", "parse"):
        assert name in asked
        assert callable(getattr(curvalg, name))
    for name in est.__all__:
        if callable(function := getattr(est, name)) and not isinstance(function, type):
            assert name in asked or name in ("bilinear", "heat_map", "gradient_norms"), name
