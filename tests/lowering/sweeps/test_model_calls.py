"""How often the model is called: at most twice a batch before the first result, and twice more for what is tried."""

from __future__ import annotations

import pytest
import torch

from curvalg import Identity, block_diagonal, inverse, registry
from curvalg.estimate import eigsh, trace

B = registry.build
BATCHES = 3
FIRST = {
    "value": lambda p, v: p.value(),
    "gradient": lambda p, v: p.gradient(),
    **{
        name: (lambda p, v, name=name: B(name).lower(p) @ v)
        for name in (
            "hessian",
            "residual",
            "ggn",
            "covariance",
            "centered_covariance",
            "ggn_class",
            "ggn_cross",
            "ggn_within",
        )
    },
    **{
        name: (lambda p, v, name=name: B(name).lower(p).prepare())
        for name in ("kfac", "ekfac", "foof", "ggn_diagonal", "covariance_diagonal")
    },
    "eigsh(hessian)": lambda p, v: eigsh(B("hessian").lower(p), 1),
    "trace(hessian)": lambda p, v: trace(B("hessian").lower(p), products=12),
    "trace(ggn)": lambda p, v: trace(B("ggn").lower(p)),
    "blocks of the ggn": lambda p, v: block_diagonal(B("ggn")).lower(p) @ v,
    "blocks of the hessian": lambda p, v: block_diagonal(B("hessian")).lower(p) @ v,
    "inverse of blocks": lambda p, v: inverse(block_diagonal(B("ggn")) + Identity).lower(p) @ v,
    "inverse of the hessian": lambda p, v: inverse(B("hessian") + 3 * Identity).lower(p) @ v,
    "J as a matrix": lambda p, v: B("jacobian").lower(p).to_dense(),
    "Jᵀ as a matrix": lambda p, v: B("jacobian").T.lower(p).to_dense(),
    "ntk": lambda p, v: B("ntk").lower(p).to_dense(),
}


@pytest.mark.parametrize("name", FIRST)
def test_calls_before_the_first_result(name, counted_model):
    problem, calls = counted_model("mlp")
    assert len(problem.data.source) == BATCHES
    FIRST[name](problem, torch.ones(problem.size).double())
    assert calls() <= 2 * BATCHES + 2


@pytest.mark.parametrize("name", ["hessian", "ggn", "covariance", "centered_covariance"])
def test_lowering_calls_it_at_most_once(name, counted_model):
    problem, calls = counted_model("mlp")
    B(name).lower(problem)
    assert calls() == 0


def test_a_refusal_comes_before_the_data_are_read_again(problem_of, monkeypatch):
    """Parameters without Kronecker factors are told after one row, not after a pass."""
    from curvalg import ProblemError

    problem = problem_of("encoder_layer")
    problem.value()
    read = []
    source = problem.data.source

    class Counting(list):
        def __iter__(self):
            for batch in source:
                read.append(len(batch[1]))
                yield batch

    monkeypatch.setattr(problem.data, "source", Counting(source))
    with pytest.raises(ProblemError, match="no Kronecker factors"):
        B("kfac", rest="refuse").lower(problem).prepare()
    assert len(read) <= 1
