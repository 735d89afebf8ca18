"""Quantities of a problem that several processes share, beside those of one process with all data."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import curvalg
from curvalg import Identity, Problem, inv_sqrt, inverse, nystrom, parse, registry
from curvalg import estimate as est

build = registry.build


@dataclass(frozen=True)
class Setup:
    """A model, its loss and batches, split among processes.

    Args:
        model, loss, batches: make them.
        options: of the problem.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[], Any]
    batches: Callable[[], list[Any]]
    options: dict[str, Any] = field(default_factory=dict)


def _weighted() -> list[Any]:
    """Uneven batches, an ignored target among them."""
    g = torch.Generator().manual_seed(3)
    found = [
        (torch.randn(n, 8, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g))
        for n in (5, 3, 6, 1, 4)
    ]
    found[1][1][0] = -100
    return found


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def _wide_mlp() -> nn.Module:
    """With more parameters than estimators make a matrix of."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 50), nn.Tanh(), nn.Linear(50, 3)).double()


def _large_mlp() -> nn.Module:
    """With so many parameters that sixteen columns are 32 MiB."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 3)).double()


def _cross_entropy() -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64))


class Tokens(nn.Module):
    """A small language model with a head that is not tied."""

    def __init__(self, vocabulary: int = 11) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(x))))


def _tokens() -> nn.Module:
    torch.manual_seed(1)
    return Tokens().double()


def _sequences() -> list[Any]:
    g = torch.Generator().manual_seed(4)
    draw = lambda n: torch.randint(0, 11, (n, 5), generator=g)
    return [(draw(n), draw(n)) for n in (3, 2, 4, 1)]


def _tokens_loss(z: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(z.flatten(0, 1), y.flatten())


def _regression() -> list[Any]:
    g = torch.Generator().manual_seed(5)
    draw = lambda n, k: torch.randn(n, k, generator=g, dtype=torch.float64)
    return [(draw(n, 8), draw(n, 3)) for n in (4, 2, 5)]


def own_loss(z: Tensor, y: Tensor) -> Tensor:
    """A callable whose reduction is found by trying."""
    return (z - y).pow(4).mean()


SETUPS = {
    "weighted": Setup(_mlp, _cross_entropy, _weighted),
    "positions": Setup(
        _tokens, lambda: curvalg.losses.CrossEntropy(class_axis=-1), _sequences, {"samples": "position"}
    ),
    "tokens": Setup(_tokens, lambda: curvalg.losses.CrossEntropy(class_axis=-1), _sequences),
    "chunked": Setup(_tokens, lambda: curvalg.losses.CrossEntropy(class_axis=-1), _sequences, {"output_memory": 0}),
    "callable": Setup(_mlp, lambda: own_loss, _regression),
    "squares": Setup(_mlp, nn.MSELoss, _regression),
    "large": Setup(_large_mlp, _cross_entropy, _weighted),
    "wide": Setup(_wide_mlp, _cross_entropy, _weighted),
}

SPLITS = {2: [(0, 3), (3, None)], 3: [(0, 1), (1, None), (0, 0)], 4: [(0, 1), (0, 0), (1, 3), (3, None)]}
"""The batches of each rank: uneven, and some have none."""


def whole(name: str, **options: Any) -> Problem:
    """The problem of one process."""
    setup = SETUPS[name]
    return Problem(setup.model(), setup.loss(), setup.batches(), **{**setup.options, **options})


def shared(group: Any, name: str, **options: Any) -> Problem:
    """The problem of all processes of a group, whose batches are split unevenly."""
    import torch.distributed as dist

    setup = SETUPS[name]
    own = slice(*SPLITS[dist.get_world_size(group)][dist.get_rank(group)])
    return Problem(setup.model(), setup.loss(), setup.batches()[own], group=group, **{**setup.options, **options})


def problems(group: Any, name: str, **options: Any) -> tuple[Problem, Problem]:
    """The problem of one process, and that of all."""
    return whole(name, **options), shared(group, name, **options)


used_before = functools.cache(shared)
"""The problem of all processes, made by the first that asks: what is asked later finds what was kept."""


def columns(size: int, count: int = 3, seed: int = 9) -> Tensor:
    return torch.randn(size, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _product(text: str) -> Callable[[Problem], Tensor]:
    def product(problem: Problem) -> Tensor:
        op = parse(text).lower(problem)
        return op @ columns(op.shape[1])

    return product


def _expression(make: Callable[[], Any]) -> Callable[[Problem], Tensor]:
    def product(problem: Problem) -> Tensor:
        op = make().lower(problem)
        return op @ columns(op.shape[1])

    return product


def _number(take: Callable[[Problem], Any]) -> Callable[[Problem], Tensor]:
    return lambda problem: torch.as_tensor(take(problem), dtype=torch.float64).reshape(-1)


damped = lambda term: build(term) + 1e-2 * Identity

QUANTITIES: dict[str, Callable[[Problem], Tensor]] = {
    "value": _number(lambda p: p.value()),
    "gradient": lambda p: p.gradient(),
    "counts": _number(lambda p: [p.num_samples, p.totals.rows, p.totals.scale, p.totals.denominator]),
    **{
        text: _product(text)
        for text in (
            "hessian",
            "ggn",
            "fisher",
            "covariance",
            "centered_covariance",
            "residual",
            "ggn_mc(samples=3, seed=4)",
            "fisher_mc(samples=2)",
            "2*hessian + ggn - 3*covariance + 0.001*identity",
            "hessian + centered_covariance",
            "ggn_diagonal",
            "ggn_diagonal(samples=3, seed=4)",
            "covariance_diagonal",
            "kfac",
            "kfac(fisher='mc', samples=2, seed=4)",
            "ekfac",
            "foof",
            "jacobian",
            "jacobian.T",
            "loss_hessian",
            "ntk",
            "jacobian.T @ loss_hessian @ jacobian",
            "block_diagonal(ggn)",
            "block_diagonal({'*weight': ggn, '*bias': covariance})",
            "restrict(hessian, '*bias')",
            "diagonal_part(hessian)",
        )
    },
    "hessian, one column": lambda p: build("hessian").lower(p) @ columns(p.size)[:, 0],
    "ggn, many products": lambda p: _many(build("ggn").lower(p)),
    "ggn, from layers": lambda p: _many(build("ggn").lower(p), 3),
    "dense ggn": lambda p: build("ggn").lower(p).to_dense(),
    "dense jacobian": lambda p: build("jacobian").lower(p).to_dense(),
    "inverse(ggn + c)": _expression(lambda: inverse(damped("ggn"))),
    "inverse(hessian + 9)": _expression(lambda: inverse(build("hessian") + 9 * Identity)),
    "inverse(ggn + c) by cg": _expression(lambda: inverse(damped("ggn"), solver="cg", rtol=1e-12)),
    "inverse(hessian + 9) by minres": _expression(
        lambda: inverse(build("hessian") + 9 * Identity, solver="minres", rtol=1e-12)
    ),
    "inverse(centered + c)": _expression(lambda: inverse(damped("centered_covariance"))),
    "inverse(kfac + c)": _expression(lambda: inverse(damped("kfac"))),
    "inverse(ekfac + c)": _expression(lambda: inverse(damped("ekfac"))),
    "inverse of blocks": _expression(lambda: inverse(curvalg.block_diagonal(build("ggn")) + 1e-2 * Identity)),
    "inv_sqrt(ggn + covariance + c)": _expression(
        lambda: inv_sqrt(build("ggn") + build("covariance") + 1e-2 * Identity)
    ),
    "nystrom": _expression(lambda: nystrom(build("ggn"), 10) + 1e-3 * Identity),
    "logdet": _number(lambda p: damped("ggn").lower(p).exact("logdet")),
    "trace": _number(lambda p: build("ggn").lower(p).exact("trace")),
    "eigenvalues": lambda p: build("ggn").lower(p).exact("eigh").eigenvalues[-5:],
    "eigsh": lambda p: est.eigsh(build("hessian").lower(p), 3, which="LA", tol=1e-12).eigenvalues,
    "svds": lambda p: est.svds(build("jacobian").lower(p), 2, tol=1e-12).values,
    "density": lambda p: est.spectral_density(build("hessian").lower(p), probes=2, steps=6).density,
    "estimated trace": _number(lambda p: est.trace(build("hessian").lower(p), products=20).value),
    "estimated diagonal": lambda p: est.diagonal(build("hessian").lower(p), products=20).value,
    "estimated logdet": _number(lambda p: est.logdet(build("ggn").lower(p) + 1.0 * Identity, products=20).value),
    "norm": _number(lambda p: est.norm(build("hessian").lower(p)).value),
    "effective dimension": _number(lambda p: est.effective_dimension(build("ggn").lower(p), 1e-2).value),
    "tic": _number(lambda p: est.tic(p, hessian=build("ggn"), damping=1e-2, products=20, method="hutchinson").value),
    "gradient norms": lambda p: est.gradient_norms(p),
    "gradient noise": _number(lambda p: est.gradient_noise(p).simple),
    "form gradient": lambda p: (
        build("hessian").lower(p).quadratic_form_gradient(columns(p.size, 2), columns(p.size, 2, 1))
    ),
}

OF_CLASSES = ("ggn_class", "ggn_cross", "ggn_within", "ggn_same")
QUANTITIES |= {term: _product(term) for term in OF_CLASSES}


def _many(op: Any, count: int = 40) -> Tensor:
    """The last of many products, after all choices between ways were made."""
    x = columns(op.shape[1], 1)[:, 0]
    for _ in range(count):
        result = op @ x
    return result


def of_processes(
    group: Any, setup: str, quantity: str, used: bool = False, options: dict[str, Any] | None = None
) -> Tensor:
    """A quantity on several processes, of a new problem or of one that others have used before."""
    return QUANTITIES[quantity]((used_before if used else shared)(group, setup, **(options or {}))).detach()


@functools.cache
def of_one_process(setup: str, quantity: str, **options: Any) -> Tensor:
    """The same on one process with all data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of estimates that are stopped early, on purpose
        return QUANTITIES[quantity](whole(setup, **options)).detach()


def exchanges(group: Any, text: str) -> tuple[int, int, int]:
    """Headers, payloads and bytes of one more product with three columns."""
    problem = shared(group, "weighted", factored=False)
    op = parse(text).lower(problem)
    x = columns(op.shape[1])
    _ = op @ x
    exchange = problem.group
    before = exchange.headers, exchange.payloads, exchange.bytes
    _ = op @ x
    after = exchange.headers, exchange.payloads, exchange.bytes
    return after[0] - before[0], after[1] - before[1], after[2] - before[2]


def decompositions(group: Any, text: str) -> tuple[int, int]:
    """Eigendecompositions that this process and one process alone make of a matrix."""
    made = []
    for problem in problems(group, "weighted"):
        count = [0]
        eigh = torch.linalg.eigh

        def counted(*args: Any, eigh: Any = eigh, count: list[int] = count, **kwargs: Any) -> Any:
            count[0] += 1
            return eigh(*args, **kwargs)

        torch.linalg.eigh = counted
        try:
            op = parse(text).lower(problem)
            _ = op @ columns(op.shape[1])
        finally:
            torch.linalg.eigh = eigh
        made.append(count[0])
    return made[1], made[0]


def in_parts(group: Any) -> tuple[float, int]:
    """The error of a product with many columns that travel in parts, and the payloads that it took."""
    one, several = problems(group, "large")
    x = columns(one.size, 16)
    op = build("ggn").lower(several)
    before = several.group.payloads
    got = op @ x
    expected = build("ggn").lower(one) @ x
    return float((got - expected).norm() / expected.norm()), several.group.payloads - before


def differences(group: Any) -> Tensor:
    """Hessian products by differences of gradients of all processes."""
    return _product("hessian_fd")(shared(group, "weighted"))
