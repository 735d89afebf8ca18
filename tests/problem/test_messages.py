"""What a user reads when model, parameters or options do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from curvalg import (
    Diagonal,
    ExpressionError,
    Identity,
    LossError,
    MatrixTerm,
    OptionError,
    Problem,
    ProblemError,
    StaleError,
    Term,
    VectorError,
    block_diagonal,
    inverse,
    registry,
)
from tests.support.zoo import make


@pytest.fixture
def case():
    return make("mlp")


def product(problem, term="ggn"):
    op = registry.build(term).lower(problem)
    return op @ np.ones(op.shape[1])


@pytest.mark.parametrize("term", ["hessian", "ggn", "covariance"])
@pytest.mark.parametrize("X", [torch.ones(3, 9).double(), torch.ones(3, 4)])
def test_inputs_that_do_not_fit_the_model(case, term, X):
    with pytest.raises(ProblemError, match="failed on batch 0, a tuple"):
        product(Problem(case.model, case.loss, (X, torch.tensor([0, 1, 2]))), term)


def test_a_type_error_inside_the_forward_is_not_blamed_on_the_call(case):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) + None

    with pytest.raises(ProblemError, match="failed on batch 0: TypeError"):
        product(Problem(Wrong().double(), case.loss, case.batches))
    with pytest.raises(ProblemError, match="forward=lambda"):
        product(
            Problem(
                case.model, case.loss, [{"x": case.batches[0][0], "z": case.batches[0][0], "y": case.batches[0][1]}]
            )
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": lambda: 1}, "params is None"),
        ({"params": "0.weigth"}, "did you mean"),
        ({"params": []}, "at least one"),
        ({"cache": -1}, "cache is"),
        ({"columns": "all"}, "columns is"),
        ({"samples": "token"}, "samples is one of"),
        ({"randomness": "ignore"}, "randomness is"),
        ({"target": "y"}, r"target is a function .*target=lambda batch: batch\['y'\]"),
        ({"forward": "x"}, "forward is a function .*forward=lambda model, batch: "),
        ({"verify": "x"}, "verify is one of"),
        ({"progress": "no"}, "progress is one of"),
    ],
)
def test_options(case, options, message):
    with pytest.raises(ProblemError, match=message):
        Problem(case.model, case.loss, case.batches, **options)


def test_numpy_integers_are_integers(case):
    problem = Problem(case.model, case.loss, case.batches, cache=np.int64(10**9), columns=np.int64(2))
    registry.build("ggn_mc", samples=2).lower(problem)
    assert problem.cache == 10**9


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name(case, layout):
    nested = torch.nested.nested_tensor([torch.ones(3).double(), torch.ones(4).double()], layout=layout)
    with pytest.raises(ProblemError, match=r"nested tensor.*to_padded_tensor"):
        Problem(case.model, case.loss, [(nested, torch.zeros(2, dtype=torch.long))]).value()


def test_two_batches_in_a_tuple(case):
    with pytest.raises(LossError, match=r"several batches are a list \[\.\.\.\]"):
        Problem(case.model, case.loss, (case.batches[0], case.batches[0])).value()


def test_a_forward_that_breaks_its_own_backward_in_place():
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)).mul_(2))

    problem = Problem(Doubling(), nn.CrossEntropyLoss(), (torch.randn(6, 4), torch.arange(6) % 3))
    with pytest.raises(StaleError, match=r"backward\(\) fails as well, the model's forward does that: write t \* 2"):
        problem.gradient()


def test_masked_arrays_are_no_leaves(case):
    with pytest.raises(OptionError, match="fill the masked entries"):
        Diagonal(np.ma.masked_array(np.ones(3), [True, False, False]))


def test_sparse_operands_and_complex_leaves(case):
    op = registry.build("ggn").lower(Problem(case.model, case.loss, case.batches))
    with pytest.raises(VectorError, match="dense"):
        op @ torch.eye(op.shape[0]).double().to_sparse()
    with pytest.raises(ExpressionError, match="real"):
        Diagonal(torch.ones(3, dtype=torch.complex64))


def test_products_with_leaves_are_detached(case):
    problem = Problem(case.model, case.loss, case.batches)
    op = Diagonal(torch.ones(problem.size).double().requires_grad_()).lower(problem)
    assert not (op @ torch.ones(problem.size).double()).requires_grad


def test_terms_that_break_the_contract(case):
    from dataclasses import dataclass

    problem = Problem(case.model, case.loss, case.batches)

    @dataclass
    class Unfrozen(Term):
        k: int = 1

    for combine in (
        lambda term: term.lower(problem),
        lambda term: term + registry.build("ggn"),
        lambda term: 2 * term,
        lambda term: term @ term,
        inverse,
        lambda term: block_diagonal({"*": term}),
    ):
        with pytest.raises(ExpressionError, match=r"Unfrozen cannot be hashed.*frozen=True"):
            combine(Unfrozen())

    @dataclass(frozen=True)
    class Misspelt(Term):
        def cotangent_dots(self, batch, tangent):
            return tangent

    for expr in (Misspelt(), Misspelt() + registry.build("ggn"), Misspelt().T):
        with pytest.raises(
            ExpressionError, match=r"misspelt .*does not define cotangent or cotangent_dot.*it defines cotangent_dots"
        ):
            expr.lower(problem)

    @dataclass(frozen=True)
    class Unfinished(MatrixTerm):
        def accumulate(self, batch, prepared=None):
            return batch.output.sum()

    with pytest.raises(ExpressionError, match=r"unfinished .*does not define finish"):
        Unfinished().lower(problem)

    @dataclass(frozen=True)
    class Lazy(MatrixTerm):
        def accumulate(self, batch, prepared=None):
            return batch.output.sum()

        def finish(self, stats, layout, prepared=None):
            return registry.build("covariance_diagonal")

    with pytest.raises(ExpressionError, match="array leaves"):
        Lazy().lower(problem) @ np.ones(problem.size)
    with pytest.raises(ExpressionError, match="range of floats"):
        (registry.build("ggn") * 10**400).lower(problem)
    with pytest.raises(ExpressionError, match="range of floats"):
        inverse(registry.build("ggn") * 10**400 + Identity).lower(problem)
