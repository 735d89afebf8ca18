"""What goes over single samples, on several processes beside one: parts of the training data, of the queries, or of both."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvalg import Identity, Problem, inverse, registry, restrict
from curvalg import estimate as est
from curvalg_plugins.laplace import laplace
from curvalg_plugins.ntk import cross_kernel
from curvalg_plugins.projections import project_gradients, trak_scores
from tests.support.rank_quantities import SETUPS, SPLITS, columns

Pair = tuple[Problem, Problem]
"""Training samples and queries."""

QUERIES = {2: [(0, 1), (1, None)], 3: [(0, 0), (0, 2), (2, None)]}
"""Batches of queries of each rank."""


def _asked(name: str) -> list[Any]:
    """Other data of the same kind, fewer."""
    return [tuple(t.flip(0)[:3] for t in batch) for batch in SETUPS[name].batches()[1:]]


def whole_pair(name: str, **options: Any) -> Pair:
    """Training samples and queries of one process."""
    setup = SETUPS[name]
    model, loss, given = setup.model(), setup.loss(), {**setup.options, **options}
    return Problem(model, loss, setup.batches(), **given), Problem(model, loss, _asked(name), **given)


def shared_pair(group: Any, name: str, split: str, **options: Any) -> Pair:
    """Those of all processes, with parts of the "training" samples, the "queries" or "both"."""
    import torch.distributed as dist

    setup, rank, size = SETUPS[name], dist.get_rank(group), dist.get_world_size(group)
    model, loss = setup.model(), setup.loss()
    given = {**setup.options, **options}
    make = lambda batches, **more: Problem(model, loss, batches, **given, **more)
    batches, asked = setup.batches(), _asked(name)
    own = batches[slice(*SPLITS[size][rank])], asked[slice(*QUERIES[size][rank])]
    training = make(batches) if split == "queries" else make(own[0], group=group)
    queries = make(asked) if split == "training" else make(own[1], group=group)
    return training, queries


pair_used_before = functools.cache(shared_pair)
"""Those of all processes, made by the first that asks: what is asked later finds what was kept."""


def damped(problem: Problem, text: str = "ekfac") -> Any:
    return inverse(registry.build(text) + 1e-1 * Identity).lower(problem)


def _flat(found: Any) -> Tensor:
    """All numbers of some results, one after the other."""
    if isinstance(found, dict):
        return torch.cat([_flat(found[name]) for name in sorted(found)])
    if isinstance(found, (tuple, list)):
        return torch.cat([_flat(part) for part in found])
    return found.double().reshape(-1)


def _influence(text: str, **options: Any) -> Callable[[Problem, Problem], Tensor]:
    return lambda p, q: _flat(est.influence(damped(p, text), q, query_batch=5, **options).scores)


def _top(p: Problem, q: Problem) -> Tensor:
    """Extremes, and the scores of the samples that they are said to be of: some are equal, in any order."""
    op = damped(p)
    values, samples, *low = est.influence(op, q, query_batch=5, topk=4).topk.sides
    scores = est.influence(op, q, query_batch=5).scores
    return _flat([values, low[0], scores.gather(1, samples), scores.gather(1, low[1])])


def _rank(p: Problem, q: Problem) -> Tensor:
    found = est.influence(damped(p), q, query_batch=5, query_rank=2)
    return _flat([found.scores, found.error.discarded, found.error.norms])


def _stream(p: Problem, q: Problem, text: str = "ekfac") -> Tensor:
    """Scores put together by the numbers that parts have."""
    parts = list(est.influence_stream(damped(p, text), q, query_batch=5))
    scores = torch.full(
        (1 + max(int(part.queries.max()) for part in parts), max(part.samples.stop for part in parts)),
        float("nan"),
        dtype=torch.float64,
    )
    for part in parts:
        scores[part.queries, part.samples] = part.scores
    return scores.reshape(-1)


def _gradients(count: int) -> Callable[[Problem, Problem], Tensor]:
    return lambda p, q: _flat(est.influence(damped(p), columns(p.size, count)))


SAMPLES: dict[str, Callable[[Problem, Problem], Tensor]] = {
    "influence, ekfac": _influence("ekfac"),
    "influence, ggn": _influence("ggn"),
    "influence, hessian by cg": lambda p, q: _flat(
        est.influence(inverse(registry.build("ggn") + 0.1 * Identity, solver="cg", rtol=1e-13).lower(p), q).scores
    ),
    "influence, by layer": _influence("ekfac", by="layer"),
    "influence, topk": _top,
    "influence, query_rank": _rank,
    "influence_stream": _stream,
    "influence_stream, ggn": lambda p, q: _stream(p, q, "ggn"),
}
"""Of training samples for queries."""

TRAINING: dict[str, Callable[[Problem, Problem], Tensor]] = {
    "influence of few gradients": _gradients(2),
    "influence of gradients": _gradients(11),
    "influence on themselves": lambda p, q: _flat(est.influence(damped(p), query_batch=5).scores),
    "influence on themselves, ggn": lambda p, q: _flat(est.influence(damped(p, "ggn"), query_batch=5).scores),
    "self_influence, ekfac": lambda p, q: est.self_influence(damped(p)),
    "self_influence, ggn": lambda p, q: est.self_influence(damped(p, "ggn")),
    "saliency": lambda p, q: est.saliency(registry.build("hessian").lower(p), "row", first_order=True).value,
    "saliency of an inverse": lambda p, q: est.saliency(damped(p, "ggn"), "row").value,
    "saliency of numbers": lambda p, q: est.saliency(registry.build("ggn").lower(p), products=20).value,
    "gradient_noise": lambda p, q: torch.tensor([est.gradient_noise(p).trace, est.gradient_noise(p).square]),
}
"""Of training samples alone."""

VARIANCES: dict[str, Callable[[Problem, Problem], Tensor]] = {
    "variance, ekfac": lambda p, q: est.functional_variance(damped(p), q),
    "variance, ggn": lambda p, q: est.functional_variance(damped(p, "ggn"), q),
    "variances, ggn": lambda p, q: est.functional_variance(damped(p, "ggn"), q, diagonal=True),
    "variance, hessian": lambda p, q: est.functional_variance(registry.build("hessian").lower(p), q),
    "variance, some parameters": lambda p, q: est.functional_variance(
        inverse(restrict(registry.build("ggn"), "2.*") + 0.1 * Identity).lower(p), q
    ),
}
"""Of the outputs of queries."""

PROJECTIONS: dict[str, Callable[[Problem, Problem], Tensor]] = {
    "project_gradients": lambda p, q: project_gradients(q, 5),
    "project_gradients, kronecker": lambda p, q: project_gradients(q, 5, kind="kronecker"),
    "trak_scores": lambda p, q: trak_scores(p, q, 5, damping=1e-2),
    "cross_kernel": lambda p, q: cross_kernel(q, p),
    "cross_kernel, turned": lambda p, q: cross_kernel(p, q),
}

POSTERIORS: dict[str, Callable[[Problem, Problem], Tensor]] = {
    **{
        f"{text}, {name}": lambda p, q, text=text, take=take: take(laplace(p, text), q)
        for text in ("kfac", "ggn")
        for name, take in {
            "evidence": lambda posterior, q: torch.tensor([posterior.log_evidence()], dtype=torch.float64),
            "prior": lambda posterior, q: torch.tensor(list(posterior.tune_prior(by="module").prior.values())),
            "validated prior": lambda posterior, q: torch.tensor(
                list(posterior.tune_prior(validation=q, grid=[0.1, 1.0]).prior.values())
            ),
            "samples": lambda posterior, q: posterior.sample(2),
            "predictions": lambda posterior, q: _flat(
                [posterior.predict(q).mean, posterior.predict(q).output_variance]
            ),
            "drawn predictions": lambda posterior, q: posterior.predict(q, link="mc", samples=20).mean,
            "predictions of inputs": lambda posterior, q: posterior.predict(columns(8, 5).T.contiguous()).mean,
            "log probability": lambda posterior, q: torch.tensor([posterior.log_probability(q)], dtype=torch.float64),
        }.items()
    }
}

POSITIONS: dict[str, Callable[[Problem, Problem], Tensor]] = {
    "influence, by position": lambda p, q: _flat(est.influence(damped(p), q, query_batch=4, by="position").scores),
}


QUANTITIES = SAMPLES | TRAINING | VARIANCES | PROJECTIONS | POSTERIORS | POSITIONS


def samples_of_processes(group: Any, setup: str, quantity: str, split: str, used: bool = False) -> Tensor:
    """A quantity on several processes, of new problems or of those that others have used before."""
    return QUANTITIES[quantity](*(pair_used_before if used else shared_pair)(group, setup, split)).detach()


@functools.cache
def samples_of_one_process(setup: str, quantity: str) -> Tensor:
    """The same on one process with all data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of estimates that are stopped early, on purpose
        expected = QUANTITIES[quantity](*whole_pair(setup)).detach()
    assert bool(expected.isfinite().all()), expected
    return expected
