"""The numbers of the device are those of the CPU, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.device.place import Place
from benchmarks.device.step import Outcome, Step
from benchmarks.device.workloads import draw, given, scaled_error
from curvalg import CurvalgError, Expr, Identity, Problem, block_diagonal, inverse, nystrom, registry, sqrt
from curvalg.estimate import (
    bilinear,
    diagonal,
    effective_dimension,
    eigsh,
    functional_variance,
    gradient_noise,
    gradient_norms,
    influence,
    influence_stream,
    logdet,
    matrix_function,
    norm,
    saliency,
    self_influence,
    spectral_density,
    svds,
    tic,
    trace,
)

BOUND = 1e-9
MODELS = ("tiny", "tiny CNN", "tiny attention", "tiny norm")
MODES: dict[str, dict[str, Any]] = {"kept": {}, "fresh": {"cache": 0}, "factored": {"factored": True}}


def terms() -> list[str]:
    """All that are registered, each once."""
    return [name for name in registry.names() if name != "empirical_fisher"]


def solvers() -> dict[str, Expr]:
    """An inverse for each solver."""
    ggn, kfac = registry.build("ggn"), registry.build("kfac")
    jacobian = registry.build("jacobian")
    damped, rtol = ggn + Identity, 1e-12
    blocks = block_diagonal(ggn, by="module") + Identity
    return {
        "diagonal": inverse(registry.build("ggn_diagonal") + Identity, solver="diagonal"),
        "kronecker": inverse(kfac + Identity),
        "eigenbasis": inverse(registry.build("ekfac") + Identity),
        "blocks": inverse(blocks, solver="blocks", rtol=rtol),
        "woodbury": inverse(nystrom(ggn, 8) + Identity, solver="woodbury"),
        "gram": inverse(damped, solver="gram"),
        "kernel": jacobian.T @ inverse(jacobian @ jacobian.T + Identity, solver="kernel") @ jacobian,
        "function": inverse(sqrt(registry.build("ggn_diagonal") + Identity) + Identity, solver="function"),
        "dense": inverse(damped, solver="dense"),
        "cg": inverse(damped, solver="cg", rtol=rtol),
        "cg, preconditioned": inverse(damped, solver="cg", rtol=rtol, preconditioner=kfac + Identity),
        "minres": inverse(damped, solver="minres", rtol=rtol),
    }


Estimator = Callable[[Problem], Any]


def _streamed(problem: Problem, damped: Expr) -> Tensor:
    """All scores of all samples for one another, one below the other."""
    (first, *others) = (part.scores for part in influence_stream(inverse(damped).lower(problem)))
    assert not others  # a few samples are one part
    return first


def estimators() -> dict[str, Estimator]:
    """A number or a tensor of each estimator; random vectors are the same on every device."""
    ggn, hessian = registry.build("ggn"), registry.build("hessian")
    damped = ggn + Identity
    methods = {
        f"trace, {method}": partial(_trace, method=method)
        for method in ("auto", "hutchinson", "hutch++", "xtrace", "xnystrace", "exact")
    }
    return {
        **methods,
        "diagonal": lambda p: diagonal(hessian.lower(p), products=12).value,
        "norm": lambda p: norm(hessian.lower(p), products=12).value,
        "eigsh": lambda p: eigsh(hessian.lower(p), 3, tol=1e-10, block=1).eigenvalues,
        "svds": lambda p: svds(registry.build("jacobian").lower(p), 2, tol=1e-10, block=1).values,
        "logdet": lambda p: logdet(damped.lower(p), products=60).value,
        "effective_dimension": lambda p: effective_dimension(ggn.lower(p), 0.1, products=60).value,
        "spectral_density": lambda p: spectral_density(hessian.lower(p), probes=2, steps=5).density,
        "matrix_function": lambda p: matrix_function(damped.lower(p), "log", _vector(p), steps=8).value,
        "influence": lambda p: influence(inverse(damped).lower(p), p.gradient()),
        "influence_stream": lambda p: _streamed(p, damped),
        "self_influence": lambda p: self_influence(inverse(damped).lower(p)),
        "functional_variance": lambda p: functional_variance(inverse(damped).lower(p), p),
        "saliency": lambda p: saliency(damped.lower(p), "parameter").value,
        "tic": lambda p: tic(p, damping=0.1).value,
        "gradient_norms": gradient_norms,
        "gradient_noise": lambda p: gradient_noise(p).simple,
        "bilinear": lambda p: bilinear(ggn.lower(p), _vector(p), _vector(p)),
    }


def steps(place: Place) -> Iterator[Step]:
    for mode in MODES:
        for model in MODELS if place.real or mode == "kept" else MODELS[:1]:  # a simulated device is slow
            yield Step(f"products, {model}, {mode}", partial(_products, place, model, mode))
        if mode == "kept":
            for model in MODELS[: 2 if place.real else 1]:
                yield Step(f"solvers, {model}", partial(_solvers, place, model))
                yield Step(f"estimators, {model}", partial(_estimators, place, model))


def _products(place: Place, model: str, mode: str) -> Outcome:
    """With a vector and with three columns."""

    def product(term: str, problem: Problem) -> Tensor:
        op = registry.build(term).lower(problem)
        V = draw(op.shape[1], 3).to(problem.device)
        single = op @ V[:, 0]
        return (op @ V) + single[:, None]

    return compared(place, f"products, {mode}", model, {term: partial(product, term) for term in terms()}, MODES[mode])


def _solvers(place: Place, model: str) -> Outcome:
    def solve(expr: Expr, problem: Problem) -> Tensor:
        product: Tensor = expr.lower(problem) @ draw(problem.size, 2).to(problem.device)
        return product

    return compared(place, "solvers", model, {name: partial(solve, expr) for name, expr in solvers().items()}, {})


def _estimators(place: Place, model: str) -> Outcome:
    return compared(place, "estimators", model, estimators(), {})


def compared(
    place: Place, what: str, model: str, questions: Mapping[str, Estimator], options: Mapping[str, Any]
) -> Outcome:
    """The worst relative error of several answers; what the CPU refuses, the device must refuse in the same way."""
    host = given(model, batches=2)
    there, errors, refused = host.to(place), {}, 0
    outcome = Outcome({"what": what, "model": model})
    for name, ask in questions.items():
        try:
            expected: Any = ask(host.problem(**options))
        except CurvalgError as error:
            expected = error
        try:
            found: Any = ask(there.problem(**options))
        except Exception as error:
            found = error
        if isinstance(expected, CurvalgError):
            outcome.need(
                type(found) is type(expected), f"{name} is refused on the CPU: {expected}; got {found!r}"[:300]
            )
            refused += 1
        elif isinstance(found, Exception):
            outcome.failures.append(f"{name}: {type(found).__name__}: {found}")
        else:
            errors[name] = scaled_error(found, expected)
            outcome.need(errors[name] <= BOUND, f"{name} is off by {errors[name]:.1e}; {BOUND:g} is allowed")
    worst = max(errors, key=errors.__getitem__, default="")
    outcome.cells |= {"answers": len(errors), "refused": refused}
    outcome.cells |= {"largest relative error": errors.get(worst), "of": worst}
    return outcome


def _trace(problem: Problem, method: str) -> float:
    return trace(registry.build("ggn").lower(problem), products=12, method=method).value


def _vector(problem: Problem) -> Tensor:
    return draw(problem.size).to(problem.device)
