"""The command ``curvalg doctor``: what is installed, what can be computed on, and whether it computes what it should."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from curvalg import Expr, Identity, Problem, __version__, inverse, registry
from curvalg.cli.made_problems.devices import available
from curvalg.errors import RegistryError
from curvalg.tensors.memory import widest

REQUIRED = (
    "torch",
    "numpy",
    "scipy",
    "optree",
    "safetensors",
    "backpack-for-pytorch",
    "typer",
    "rich",
    "tqdm",
    "psutil",
)
"""Distributions that curvalg needs."""

OPTIONAL = {
    "matplotlib": 'pictures; pip install "curvalg[plot]"',
    "scikit-learn": 'the problems digits and digits-cnn; pip install "curvalg[demo]"',
    "transformers": "models of Hugging Face; pip install transformers",
    "laplace-torch": "posteriors of laplace-torch with curvature from here; pip install laplace-torch",
}
"""Distributions that some of curvalg needs: what for, and how to have them."""

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-3}
"""The relative error that a check may have, by the precision of a device."""


@dataclass(frozen=True)
class Check:
    """A product compared with the matrix that plain torch gives.

    Args:
        device: where it was computed.
        what: its matrix.
        error: ‖difference‖ / ‖product‖; None where there was no product.
        limit: the largest error that passes.
        failure: the message of an exception, or none.
    """

    device: str
    what: str
    error: float | None
    limit: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the product is right."""
        return self.error is not None and self.error <= self.limit


@dataclass(frozen=True)
class Examination:
    """All that the doctor found.

    Args:
        versions: of curvalg, Python and the distributions that it needs; None: not installed.
        optional: of those that some of it needs.
        devices: name, and its widest floating-point type.
        terms: name, and the distribution with its version that brought it.
        broken: plugins that cannot be used, with the reason and the cure.
        checks: the comparisons.
    """

    versions: dict[str, str | None]
    optional: dict[str, str | None]
    devices: dict[str, str]
    terms: dict[str, str]
    broken: dict[str, str]
    checks: list[Check]

    @property
    def healthy(self) -> bool:
        """Whether all that is needed is there, and every comparison passed."""
        return None not in self.versions.values() and all(check.passed for check in self.checks)


def examine() -> Examination:
    """Look at the installation, and compare a tiny problem with plain torch on every device."""
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    devices = available()
    broken = registry.failures()
    return Examination(
        versions={"curvalg": __version__, "Python": python, **{name: _version(name) for name in REQUIRED}},
        optional={name: _version(name) for name in OPTIONAL},
        devices={name: str(widest(torch.device(name))).removeprefix("torch.") for name in devices},
        terms={name: _origin(name) for name in registry.names() if name not in broken},
        broken=broken,
        checks=[check for name in devices for check in compare(torch.device(name))],
    )


def compare(device: torch.device) -> Iterator[Check]:
    """Products with ∇²L, Σ JᵀBJ and (Σ JᵀBJ + λ)⁻¹ of a tiny network, beside the dense matrices of torch.

    Args:
        device: where both are computed.
    """
    dtype, damping = widest(device), 0.1
    draw = torch.Generator(device="cpu").manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(device, dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, device="cpu"))
    inputs = torch.randn(10, 3, generator=draw, device="cpu").to(device, dtype)
    labels = (torch.arange(10, device="cpu") % 3).to(device)
    problem = Problem(net, nn.CrossEntropyLoss(), [(inputs[:7], labels[:7]), (inputs[7:], labels[7:])])
    hessian, ggn = dense(net, inputs, labels)
    shifted = ggn + damping * torch.eye(len(ggn), dtype=dtype, device=device)
    vector = torch.randn(len(ggn), generator=draw, device="cpu").to(device, dtype)
    build, solve = registry.build, torch.linalg.solve
    comparisons: dict[str, tuple[Callable[[], Expr], Callable[[], Tensor]]] = {
        "hessian": (lambda: build("hessian"), lambda: hessian @ vector),
        "ggn": (lambda: build("ggn"), lambda: ggn @ vector),
        "inverse": (lambda: inverse(build("ggn") + damping * Identity), lambda: solve(shifted, vector)),
    }
    for what, (expression, product) in comparisons.items():
        try:
            right = product()
            error = float((expression().lower(problem) @ vector - right).norm() / right.norm())
            yield Check(str(device), what, error, LIMITS[dtype])
        except Exception as failure:  # whatever breaks is what the doctor is asked for
            yield Check(str(device), what, None, LIMITS[dtype], f"{type(failure).__name__}: {failure}")


def dense(net: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """∇²L and the GGN Σ JᵀBJ of a mean cross-entropy, both (D, D), by torch alone.

    Args:
        net: the network.
        inputs: of all samples.
        labels: of all samples.
    """
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    flat = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])

    def output(point: Tensor) -> Tensor:
        parts = point.split([shape.numel() for shape in shapes.values()])
        tensors = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        found: Tensor = torch.func.functional_call(net, tensors, (inputs,))
        return found

    def loss(outputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels)

    jacobian = torch.func.jacrev(output)(flat).flatten(0, 1)
    inner = torch.func.hessian(loss)(output(flat))
    size = len(jacobian)
    hessian: Tensor = torch.func.hessian(lambda point: loss(output(point)))(flat)
    return hessian, jacobian.T @ inner.reshape(size, size) @ jacobian


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _origin(name: str) -> str:
    try:
        spec = registry.spec(name)
    except RegistryError:  # two plugins share the name
        return "ambiguous"
    return f"{spec.distribution} {spec.version}" if spec.distribution else "this program"


def table(found: Examination) -> Group:
    """What was found, for people: a table of each topic, and the verdict."""
    verdict, color = ("all is well", "green") if found.healthy else ("something is wrong", "red")
    missing = "missing; install curvalg again"
    topics = {
        "installed": {name: value or missing for name, value in found.versions.items()},
        "optional": {name: value or f"not installed: {OPTIONAL[name]}" for name, value in found.optional.items()},
        "devices": {
            name: dtype if dtype == "float64" else f"{dtype}, no float64" for name, dtype in found.devices.items()
        },
        "terms": found.terms,
        "plugins that cannot be used": found.broken,
        "self-test": {f"{check.what} on {check.device}": _outcome(check) for check in found.checks},
    }
    shown = [part for title, rows in topics.items() if rows for part in (_rows(title, rows), Text())]
    return Group(*shown, Text(verdict, style=f"bold {color}"))


def _rows(title: str, rows: Mapping[str, str]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
    shown.add_column(title, overflow="fold", no_wrap=False)
    shown.add_column("", overflow="fold")
    for name, value in rows.items():
        shown.add_row(Text(name), Text(value))
    return shown


def _outcome(check: Check) -> str:
    if check.error is None:
        return f"failed: {check.failure}"
    verdict = "right" if check.passed else "WRONG"
    return f"{verdict}, relative error {check.error:.1e} (at most {check.limit:.0e})"


def as_json(found: Examination) -> str:
    """What was found, as JSON for programs and for reports of faults."""
    checks = [{**asdict(check), "passed": check.passed} for check in found.checks]
    return json.dumps({**asdict(found), "checks": checks, "healthy": found.healthy}, indent=2)
